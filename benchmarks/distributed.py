"""What two ranks are worth on one machine, over loopback: seconds of an evaluation, bytes sent.

    python -m benchmarks.distributed --json benchmarks/results/distributed.json

Each way of computing runs in processes of its own, by turns, and the best of all rounds counts: one
process with one BLAS thread and with two, and two ranks with one each, by halves of guidance, by
sequence, and with a prompt each, where seconds are those per video. The ranks are started as
mlx.launch starts them, without its parent, which on Linux keeps a core busy. Takes eight minutes on
two cores that nobody else uses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx_sora  # noqa: F401  (before mlx.core, so that the fast BLAS is in place)

# isort: split
import mlx.core as mx

from benchmarks.common import RESULTS, markdown, write_json
from mlx_sora.accel.sequence_parallel import SequenceParallel
from mlx_sora.distributed.group import init_ranks
from mlx_sora.distributed.partition import sent_bytes
from mlx_sora.geometry import Size, plan_geometry
from mlx_sora.loading.model_folder import find_model
from mlx_sora.loading.networks import load_transformer
from mlx_sora.memory.flops import Grid
from mlx_sora.models.hooks import Hooks, Sharding, Unsharded
from mlx_sora.models.stdit3 import STDiT3, STDiT3Config
from tests.helpers.ranks import launch

#: Name: ranks, BLAS threads of each, halves of guidance that they are in; 0 if they share nothing.
WAYS = {
    "one process, one thread": (1, 1, 1),
    "one process, two threads": (1, 2, 1),
    "two ranks, guidance": (2, 1, 2),
    "two ranks, sequence": (2, 1, 1),
    "two ranks, a prompt each": (2, 1, 0),
}
TEXT = 60


@dataclass(frozen=True)
class Work:
    """What is evaluated: a model at a size, so many times, of which the first only warms up."""

    model: str
    size: Size
    frames: int
    count: int


WORKS = {
    "xl-2": Work("xl-2", Size(426, 240), 34, 2),
    "shapes": Work("shapes", Size(64, 64), 17, 40),
    "shapes, 51 frames": Work("shapes", Size(64, 64), 51, 40),
    "shapes, 51 frames, 128x128": Work("shapes", Size(128, 128), 51, 20),
}


def network(model: str, blocks: int) -> STDiT3:
    """The bundled transformer, or `blocks` pairs of blocks of the published width, not trained."""
    if model == "shapes":
        return load_transformer(find_model("shapes"), mx.float32)
    mx.random.seed(0)
    made = STDiT3(replace(STDiT3Config.xl_2(), depth=blocks))
    mx.eval(made.parameters())
    return made


def evaluations(net: STDiT3, work: Work, layout: Sharding) -> Iterator[Callable[[], mx.array]]:
    """Evaluations of a guided batch, each to be made once."""
    latent = plan_geometry(work.size, work.frames).latent
    z = mx.random.normal((2, *latent, net.config.in_channels), key=mx.random.key(1))
    text = mx.random.normal((TEXT, net.config.caption_channels), key=mx.random.key(2))
    conditions = net.prepare([text, net.null_text(TEXT)], latent, height=240, width=426, fps=24)
    context = Hooks(sharding=layout)
    for i in range(work.count):
        t = mx.array([900.0 - i] * 2)
        yield lambda t=t: net(z, t, conditions, None, context)


def measure(name: str, blocks: int, halves: int) -> dict[str, Any]:
    """In one rank: seconds of the fastest evaluation, bytes sent in each, and a sum to compare."""
    ranks, work = init_ranks(), WORKS[name]
    net = network(work.model, blocks)
    mesh = SequenceParallel(ranks, halves) if ranks.size > 1 and halves else None
    seconds, sent, out = [], 0, mx.zeros(1)
    for evaluate in evaluations(net, work, mesh or Unsharded()):
        ranks.broadcast_object(None)  # all begin at once
        before, begun = ranks.sent_bytes, time.perf_counter()
        out = evaluate()
        mx.eval(out)
        seconds.append(time.perf_counter() - begun)
        sent = ranks.sent_bytes - before
    grid = Grid.from_latent(net.config, plan_geometry(work.size, work.frames).latent, 2, TEXT)
    return {
        "seconds": min(seconds[1:]) / (1 if halves else ranks.size),
        "sent": sent,
        "foretold": 0 if mesh is None else sent_bytes(net.config, grid, mesh.plan),
        "outcome": float(mx.abs(out).mean().item()),  # type: ignore[arg-type]
    }


def run(work: str, blocks: int, way: str) -> dict[str, Any]:
    """One way of computing, in processes of its own; the slowest rank and the most bytes count."""
    ranks, threads, halves = WAYS[way]
    words = ["-m", "benchmarks.distributed", "--work", work, "--halves", str(halves)]
    made = launch(
        ranks,
        [*words, "--blocks", str(blocks)],
        variables={"OPENBLAS_NUM_THREADS": str(threads)},
        timeout=1800,
    )
    if any(each.returncode for each in made):
        sys.exit(f"{way} failed:\n" + "\n".join(each.stderr for each in made))
    told = [json.loads(each.stdout) for each in made]
    slowest = max(told, key=lambda found: found["seconds"])
    return slowest | {"sent": max(found["sent"] for found in told)}


def compare(work: str, blocks: int, rounds: int) -> dict[str, Any]:
    """All ways by turns; the best of each, and ratios to one process."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for way in WAYS:
            made = run(work, blocks, way)
            if way not in found or made["seconds"] < found[way]["seconds"]:
                found[way] = made
            print(f"{work}, {way}: {made['seconds']:.3f} s", file=sys.stderr)
    one, two = (found[way]["seconds"] for way in list(WAYS)[:2])
    for made in found.values():
        made["to one thread"] = round(one / made["seconds"], 3)
        made["to two threads"] = round(two / made["seconds"], 3)
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Of one work."""
    rows = [
        [
            way,
            f"{made['seconds']:.3f}",
            f"{made['to one thread']:.2f}",
            f"{made['to two threads']:.2f}",
            f"{made['sent'] / 1e6:.2f}",
            f"{made['foretold'] / 1e6:.2f}",
        ]
        for way, made in found.items()
    ]
    speed = ["seconds", "to one thread", "to two threads"]
    return markdown(["evaluation", *speed, "MB sent", "foretold"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "distributed.json")
    parser.add_argument("--rounds", type=int, default=2, help="default 2")
    parser.add_argument("--blocks", type=int, default=2, help="block pairs of xl-2, default 2")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--work", choices=WORKS, help=argparse.SUPPRESS)  # one rank of a run
    parser.add_argument("--halves", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        print(json.dumps(measure(args.work, args.blocks, args.halves)))
        return
    found = {work: compare(work, args.blocks, args.rounds) for work in args.works}
    for work, ways in found.items():
        print(f"\n{work}\n\n{table(ways)}")
    write_json(args.json, {"blocks": args.blocks, "rounds": args.rounds, **found})


if __name__ == "__main__":
    main()
