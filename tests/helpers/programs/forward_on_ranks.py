"""Run on every rank: evaluations on all ranks, compared with the same on one.

Writes a JSON object: for each case the largest difference, in standard deviations, and the bytes
and messages, counted and estimated.
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
from mlx_sora.models.text_segments import SegmentedText, Text
from tests.helpers.networks import STDIT, random_weights


@dataclass(frozen=True)
class Case:
    """One case. batch, grid (T, H, W): of the latents. cached: with a step cache.

    segments: the text changes within the second half of the frames.
    """

    name: str
    grid: tuple[int, int, int]
    batch: int = 2
    cfg_degree: int = 1
    merged: bool = False
    masked: bool = False
    cached: bool = False
    texts: tuple[int, int] = (5, 5)
    segments: bool = False


def cases(ranks: int) -> Iterator[Case]:
    """Yield the cases for so many ranks; few for many, as all run on one machine."""
    for frames in (1, 2, 3, 5) if ranks == 2 else (1, 3, 5):
        yield Case(f"{frames} frames", (frames, 5, 6))
        yield Case(f"{frames} frames merged", (frames, 5, 6), merged=True)
    yield Case("two tokens", (4, 2, 4))
    yield Case("one token", (4, 2, 2))
    yield Case("masked", (5, 5, 6), masked=True)
    yield Case("cached", (5, 5, 6), cached=True)
    yield Case("texts of two lengths", (5, 5, 6), texts=(3, 8))
    yield Case("segments", (5, 5, 6), texts=(3, 8), segments=True)
    yield Case("segments merged", (7, 5, 6), merged=True, segments=True)
    if ranks % 2 == 0:
        yield Case("cfg", (5, 5, 6), cfg_degree=2)
        yield Case("cfg of one sample", (5, 5, 6), batch=1, cfg_degree=2)
        yield Case("cfg merged", (7, 5, 6), cfg_degree=2, merged=True)
        yield Case("cfg masked", (5, 5, 6), cfg_degree=2, masked=True)
        yield Case("cfg cached", (5, 5, 6), cfg_degree=2, cached=True)
        yield Case("cfg of two lengths", (5, 5, 6), cfg_degree=2, texts=(3, 8))
        yield Case("cfg of segments", (5, 5, 6), cfg_degree=2, texts=(3, 8), segments=True)


class RecordedResidual:
    """A cache that never replaces the blocks and records their residual."""

    def __init__(self) -> None:
        self.residual: mx.array | None = None

    def cached_residual(self, x: mx.array, t: mx.array, x_mask: mx.array | None) -> mx.array | None:
        return None

    def update(self, x: mx.array, out: mx.array) -> None:
        self.residual = out - x


def outcomes(network: STDiT3, case: Case, context: Hooks[BlockPair]) -> list[mx.array]:
    """Return the outputs of two evaluations, and the residuals that the cache saw."""
    z = mx.random.normal((case.batch, *case.grid, 4), key=mx.random.key(4))
    text = mx.random.normal((8, network.config.caption_channels), key=mx.random.key(5))
    texts: list[Text] = [text[:length] for length in case.texts[: case.batch]]
    if case.segments:
        frames = case.grid[0]
        shares = [(1.0, 0.0)] * (frames // 2) + [(0.3, 0.7)] + [(0.0, 1.0)] * (frames - frames // 2)
        texts = [
            SegmentedText((text[:length], text[3:6]), tuple(shares[:frames]))
            for length in case.texts[: case.batch]
        ]
    conditions = network.prepare(texts, case.grid, height=40, width=48, fps=24)
    mask = None
    if case.masked:
        mask = mx.array([[frame > 0 for frame in range(case.grid[0])]] * case.batch)
    found = []
    for t in (900.0, 600.0):
        cache = RecordedResidual() if case.cached else None
        hooks = replace(context, block_cache=cache)
        out = network(z, mx.array([t] * case.batch), conditions, mask, hooks)
        mx.eval(out)
        found.append(out)
        if cache is not None and cache.residual is not None:
            found.append(cache.residual)
    return found


@contextmanager
def counted_messages() -> Iterator[list[int]]:
    """Yield a list to which every exchange of this rank adds its messages."""
    found: list[int] = []

    def all_gather(ranks: Ranks, x: mx.array) -> mx.array:
        found.append(ranks.size - 1)
        return real_gather(ranks, x)

    def exchange(ranks: Ranks, x: mx.array, shape: Sequence[int]) -> mx.array:
        found.append(1)
        return real_exchange(ranks, x, shape)

    real_gather, real_exchange = Ranks.all_gather, Ranks.exchange
    with patch.object(Ranks, "all_gather", all_gather), patch.object(Ranks, "exchange", exchange):
        yield found


def compare(network: STDiT3, case: Case, ranks: Ranks) -> dict[str, float]:
    tokens = PairedFrames() if case.merged else NoMerging()
    single = outcomes(network, case, Hooks(token_merging=tokens))
    sharding = SequenceParallel(ranks, case.cfg_degree)
    before = ranks.sent_bytes
    with counted_messages() as messages:
        sharded = outcomes(network, case, Hooks(token_merging=tokens, sharding=sharding))
    grid = Grid.from_latent(network.config, case.grid, case.batch, 8)
    estimated = sent_bytes(
        network.config, grid, sharding.plan, stride=tokens.stride, gather_hidden=case.cached
    )
    differences = [
        (mx.abs(a - b).max() / mx.std(a)).item() for a, b in zip(single, sharded, strict=True)
    ]
    return {
        "difference": max(map(float, differences)),  # type: ignore[arg-type]
        "sent": ranks.sent_bytes - before,
        "estimated": 2 * estimated,
        "messages": sum(messages),
        "estimated messages": 2 * sent_messages(network.config, grid, sharding.plan),
    }


def main() -> None:
    ranks = init_ranks()
    network = STDiT3(STDIT)
    # As small as trained weights are, so that rounding does not grow from block to block.
    weights = {name: value / 3 for name, value in random_weights(network, 2).items()}
    network.load_weights(list(weights.items()))
    found = {case.name: compare(network, case, ranks) for case in cases(ranks.size)}
    everything = ranks.all_gather_object(found)
    if ranks.is_rank0:
        sys.stdout.write(json.dumps(everything))


if __name__ == "__main__":
    main()
