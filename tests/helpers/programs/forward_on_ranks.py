"""Run on every rank: evaluations made together, against the same ones made alone.

Writes a JSON object: case to the largest difference, in standard deviations, and to the bytes and
hops that were sent and foretold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import mlx_sora  # noqa: F401  (before mlx.core, so that the fast BLAS is in place)

# isort: split
import mlx.core as mx

from mlx_sora.accel.sequence_parallel import SequenceParallel
from mlx_sora.accel.tdtm import PairedFrames
from mlx_sora.distributed.group import Ranks, init_ranks
from mlx_sora.distributed.partition import sent_bytes, sent_messages
from mlx_sora.memory.flops import Grid
from mlx_sora.models.hooks import Hooks, NoMerging
from mlx_sora.models.stdit3 import BlockPair, STDiT3
from tests.helpers.networks import STDIT, random_weights


@dataclass(frozen=True)
class Case:
    """batch, grid (T, H, W): of the latents. halves: groups that the ranks are in."""

    name: str
    grid: tuple[int, int, int]
    batch: int = 2
    halves: int = 1
    merged: bool = False
    masked: bool = False
    watched: bool = False
    texts: tuple[int, int] = (5, 5)


def cases(ranks: int) -> Iterator[Case]:
    """What so many ranks can do; few of it for many, as all run on one machine."""
    for frames in (1, 2, 3, 5) if ranks == 2 else (1, 3, 5):
        yield Case(f"{frames} frames", (frames, 5, 6))
        yield Case(f"{frames} frames merged", (frames, 5, 6), merged=True)
    yield Case("two places", (4, 2, 4))
    yield Case("one place", (4, 2, 2))
    yield Case("masked", (5, 5, 6), masked=True)
    yield Case("watched", (5, 5, 6), watched=True)
    yield Case("texts of two lengths", (5, 5, 6), texts=(3, 8))
    if ranks % 2 == 0:
        yield Case("halves", (5, 5, 6), halves=2)
        yield Case("halves of one sample", (5, 5, 6), batch=1, halves=2)
        yield Case("halves merged", (7, 5, 6), halves=2, merged=True)
        yield Case("halves masked", (5, 5, 6), halves=2, masked=True)
        yield Case("halves watched", (5, 5, 6), halves=2, watched=True)
        yield Case("halves of two lengths", (5, 5, 6), halves=2, texts=(3, 8))


class Watcher:
    """Sees what the blocks made; fills the seam StackPolicy."""

    def __init__(self) -> None:
        self.made: mx.array | None = None

    def cached_residual(self, x: mx.array, t: mx.array, x_mask: mx.array | None) -> mx.array | None:
        return None

    def update(self, x: mx.array, out: mx.array) -> None:
        self.made = out - x


def outcomes(network: STDiT3, case: Case, context: Hooks[BlockPair]) -> list[mx.array]:
    """Two evaluations in a row, and what a stack policy saw of the blocks in each."""
    z = mx.random.normal((case.batch, *case.grid, 4), key=mx.random.key(4))
    text = mx.random.normal((8, network.config.caption_channels), key=mx.random.key(5))
    texts = [text[:length] for length in case.texts[: case.batch]]
    conditions = network.prepare(texts, case.grid, height=40, width=48, fps=24)
    mask = None
    if case.masked:
        mask = mx.array([[frame > 0 for frame in range(case.grid[0])]] * case.batch)
    found = []
    for t in (900.0, 600.0):
        watcher = Watcher() if case.watched else None
        seams = replace(context, block_cache=watcher)
        out = network(z, mx.array([t] * case.batch), conditions, mask, seams)
        mx.eval(out)
        found.append(out)
        if watcher is not None and watcher.made is not None:
            found.append(watcher.made)
    return found


@contextmanager
def counted_hops() -> Iterator[list[int]]:
    """Those of every exchange of this rank in the block, as they come."""
    found: list[int] = []

    def gather(ranks: Ranks, x: mx.array) -> mx.array:
        found.append(ranks.size - 1)
        return gather_of(ranks, x)

    def swap(ranks: Ranks, x: mx.array, shape: Sequence[int]) -> mx.array:
        found.append(1)
        return swap_of(ranks, x, shape)

    gather_of, swap_of = Ranks.all_gather, Ranks.exchange
    with patch.object(Ranks, "all_gather", gather), patch.object(Ranks, "exchange", swap):
        yield found


def compare(network: STDiT3, case: Case, ranks: Ranks) -> dict[str, float]:
    tokens = PairedFrames() if case.merged else NoMerging()
    alone = outcomes(network, case, Hooks(token_merging=tokens))
    mesh = SequenceParallel(ranks, case.halves)
    before = ranks.sent_bytes
    with counted_hops() as hopped:
        together = outcomes(network, case, Hooks(token_merging=tokens, sharding=mesh))
    grid = Grid.of(network.config, case.grid, case.batch, 8)
    how = {"stride": tokens.stride, "watched": case.watched}
    foretold = sent_bytes(network.config, grid, mesh.plan, **how)  # type: ignore[arg-type]
    differences = [
        (mx.abs(a - b).max() / mx.std(a)).item() for a, b in zip(alone, together, strict=True)
    ]
    return {
        "difference": max(map(float, differences)),  # type: ignore[arg-type]
        "sent": ranks.sent_bytes - before,
        "foretold": 2 * foretold,
        "hops": sum(hopped),
        "foretold hops": 2 * sent_messages(network.config, grid, mesh.plan),
    }


def main() -> None:
    ranks = init_ranks()
    network = STDiT3(STDIT)
    # As small as trained weights are, so that rounding does not grow from block to block.
    weights = {name: value / 3 for name, value in random_weights(network, 2).items()}
    network.load_weights(list(weights.items()))
    found = {case.name: compare(network, case, ranks) for case in cases(ranks.size)}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
