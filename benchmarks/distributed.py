"""Measure two ranks on one machine, over loopback: seconds of an evaluation, bytes sent.

    python -m benchmarks.distributed --json benchmarks/results/distributed.json

Each setup runs in processes of its own, in turn, and the best of all rounds counts: one process
with one BLAS thread and with two; two ranks with one thread each, in CFG parallel, in sequence
parallel, and with a prompt each (seconds per video). Takes eight minutes on two idle cores.
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

#: Name: ranks, BLAS threads of each, CFG degree (0: each rank makes a video of its own).
SETUPS = {
    "one process, one thread": (1, 1, 1),
    "one process, two threads": (1, 2, 1),
    "two ranks, guidance": (2, 1, 2),
    "two ranks, sequence": (2, 1, 1),
    "two ranks, a prompt each": (2, 1, 0),
}
TEXT = 60


@dataclass(frozen=True)
class Work:
    """A model at a size, evaluated `count` times. The first time warms up."""

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
    """Return the bundled transformer, or `blocks` untrained block pairs of the published width."""
    if model == "shapes":
        return load_transformer(find_model("shapes"), mx.float32)
    mx.random.seed(0)
    transformer = STDiT3(replace(STDiT3Config(), depth=blocks))
    mx.eval(transformer.parameters())
    return transformer


def evaluations(net: STDiT3, work: Work, sharding: Sharding) -> Iterator[Callable[[], mx.array]]:
    """Yield evaluations of a guided batch, to be called once each."""
    latent = plan_geometry(work.size, work.frames).latent
    z = mx.random.normal((2, *latent, net.config.in_channels), key=mx.random.key(1))
    text = mx.random.normal((TEXT, net.config.caption_channels), key=mx.random.key(2))
    conditions = net.prepare([text, net.null_text(TEXT)], latent, height=240, width=426, fps=24)
    hooks = Hooks(sharding=sharding)
    for i in range(work.count):
        t = mx.array([900.0 - i] * 2)
        yield lambda t=t: net(z, t, conditions, None, hooks)


def measure(name: str, blocks: int, cfg_degree: int) -> list[dict[str, Any]]:
    """Measure on each rank: seconds of the fastest evaluation, bytes sent in each, mean output."""
    ranks, work = init_ranks(), WORKS[name]
    net = network(work.model, blocks)
    sharding = SequenceParallel(ranks, cfg_degree) if ranks.size > 1 and cfg_degree else None
    seconds, sent, out = [], 0, mx.zeros(1)
    for evaluate in evaluations(net, work, sharding or Unsharded()):
        ranks.broadcast_object(None)  # all begin at once
        before, start = ranks.sent_bytes, time.perf_counter()
        out = evaluate()
        mx.eval(out)
        seconds.append(time.perf_counter() - start)
        sent = ranks.sent_bytes - before
    grid = Grid.from_latent(net.config, plan_geometry(work.size, work.frames).latent, 2, TEXT)
    return ranks.all_gather_object(
        {
            "seconds": min(seconds[1:]) / (1 if cfg_degree else ranks.size),
            "sent": sent,
            "estimated": 0 if sharding is None else sent_bytes(net.config, grid, sharding.plan),
            "outcome": float(mx.abs(out).mean().item()),  # type: ignore[arg-type]
        }
    )


def run(work: str, blocks: int, setup: str) -> dict[str, Any]:
    """Measure one setup in processes of its own. The slowest rank and the most bytes count."""
    ranks, threads, cfg_degree = SETUPS[setup]
    words = ["-m", "benchmarks.distributed", "--work", work, "--cfg-degree", str(cfg_degree)]
    results = launch(
        ranks,
        [*words, "--blocks", str(blocks)],
        variables={"OPENBLAS_NUM_THREADS": str(threads)},
        timeout=1800,
    )
    if any(results.codes):
        sys.exit(f"{setup} failed:\n{results.stderr}")
    found = json.loads(results.stdout)
    slowest = max(found, key=lambda each: each["seconds"])
    return slowest | {"sent": max(each["sent"] for each in found)}


def compare(work: str, blocks: int, rounds: int) -> dict[str, Any]:
    """Measure all setups in turn; return the best of each, and its speed against one process."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for setup in SETUPS:
            result = run(work, blocks, setup)
            if setup not in found or result["seconds"] < found[setup]["seconds"]:
                found[setup] = result
            print(f"{work}, {setup}: {result['seconds']:.3f} s", file=sys.stderr)
    one, two = (found[setup]["seconds"] for setup in list(SETUPS)[:2])
    for result in found.values():
        result["to one thread"] = round(one / result["seconds"], 3)
        result["to two threads"] = round(two / result["seconds"], 3)
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the table of one model and size."""
    rows = [
        [
            setup,
            f"{result['seconds']:.3f}",
            f"{result['to one thread']:.2f}",
            f"{result['to two threads']:.2f}",
            f"{result['sent'] / 1e6:.2f}",
            f"{result['estimated'] / 1e6:.2f}",
        ]
        for setup, result in found.items()
    ]
    speed = ["seconds", "to one thread", "to two threads"]
    return markdown(["evaluation", *speed, "MB sent", "estimated"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "distributed.json")
    parser.add_argument("--rounds", type=int, default=2, help="default 2")
    parser.add_argument("--blocks", type=int, default=2, help="block pairs of xl-2, default 2")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--work", choices=WORKS, help=argparse.SUPPRESS)  # one rank of a run
    parser.add_argument("--cfg-degree", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        measured = measure(args.work, args.blocks, args.cfg_degree)
        if init_ranks().is_rank0:
            print(json.dumps(measured))
        return
    found = {work: compare(work, args.blocks, args.rounds) for work in args.works}
    for work, results in found.items():
        print(f"\n{work}\n\n{table(results)}")
    write_json(args.json, {"blocks": args.blocks, "rounds": args.rounds, **found})


if __name__ == "__main__":
    main()
