"""CFG and sequence parallelism: several ranks compute one evaluation of the transformer.

Half of the ranks compute the conditional prediction, half the unconditional one. The ranks of a
half split the frames in spatial blocks, whose attention stays within a frame, and the spatial
tokens in temporal blocks, whose attention runs along time. Between the blocks they exchange
shards. Cross-attention and MLP work token by token. Everything else (noise, sampler, caches) runs
on every rank, so that all have the state of a single process after each step.
Dimension letters: B batch, T frames, S tokens per frame, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_sora.distributed.group import Ranks
from mlx_sora.distributed.partition import ParallelPlan, split_evenly
from mlx_sora.models.hooks import Shard, Sharding, Unsharded


class SequenceParallel(Sharding):
    """Sharding over `ranks` in `cfg_degree` groups, each with its part of the batch."""

    def __init__(self, ranks: Ranks, cfg_degree: int = 1) -> None:
        """Raise ValueError if the ranks do not divide into equal groups."""
        if ranks.size % cfg_degree:
            raise ValueError(f"{ranks.size} ranks do not make {cfg_degree} equal groups")
        self._ranks = ranks
        sp_degree = ranks.size // cfg_degree
        self._group = ranks.split(ranks.rank // sp_degree) if 1 < sp_degree < ranks.size else None
        self.plan = ParallelPlan(
            ranks.size, cfg_degree, subgroups=self._group is not None, ring=ranks.ring
        )

    def shard(self, shape: Sequence[int], stride: int) -> Shard:
        batch, frames, tokens = shape
        plan = self.plan.for_batch(batch)
        if plan.ranks == 1:
            return Unsharded()
        return _TokenShard(
            self._ranks,
            self._group if plan.subgroups else None,
            plan,
            batch // plan.cfg_degree,
            split_evenly(frames, plan.sp_degree, stride),
            split_evenly(tokens, plan.sp_degree),
        )


class _TokenShard:
    """This rank's shard of the tokens.

    group: the ranks that split the same samples, if they have collectives of their own. rows:
    samples of each group. frames, tokens: ranges by rank of the group.
    """

    def __init__(
        self,
        ranks: Ranks,
        group: Ranks | None,
        plan: ParallelPlan,
        rows: int,
        frames: Sequence[range],
        tokens: Sequence[range],
    ) -> None:
        self._ranks, self._group, self._plan = ranks, group, plan
        self._frames, self._tokens = frames, tokens
        cfg_rank, self._index = divmod(ranks.rank, plan.sp_degree)
        self.batch_slice = slice(cfg_rank * rows, (cfg_rank + 1) * rows)

    def scatter(self, x: mx.array) -> mx.array:
        return self.scatter_frames(x[self.batch_slice])

    def scatter_frames(self, x: mx.array) -> mx.array:
        return x if x.shape[1] == 1 else _slice(x, 1, self._frames[self._index])

    def to_temporal(self, x: mx.array) -> mx.array:
        return self._all_to_all(x, 1, self._frames, self._tokens)

    def to_spatial(self, x: mx.array) -> mx.array:
        return self._all_to_all(x, 2, self._tokens, self._frames)

    def gather(self, x: mx.array) -> mx.array:
        shards, count = self._ranks.all_gather(_pad(x, 2, self._tokens)), len(self._tokens)
        samples = [
            mx.concatenate(_unpad(shards[i : i + count], 2, self._tokens), axis=2)
            for i in range(0, len(shards), count)
        ]
        return mx.concatenate(samples)

    def _all_to_all(
        self, x: mx.array, axis: int, gathered: Sequence[range], scattered: Sequence[range]
    ) -> mx.array:
        """Gather x along `axis`, split by `gathered`; scatter it along the other axis."""
        if len(gathered) == 1:
            return x
        across, own = 3 - axis, scattered[self._index]
        if self._plan.pairwise:
            other = 1 - self._index
            shape = list(x.shape)
            shape[axis], shape[across] = len(gathered[other]), len(own)
            received = self._ranks.exchange(_slice(x, across, scattered[other]), shape)
            shards = [_slice(x, across, own), received]
            shards = shards if self._index == 0 else shards[::-1]
        else:
            shards = [
                _slice(shard, across, own) for shard in self._gather_group(_pad(x, axis, gathered))
            ]
        return mx.concatenate(_unpad(shards, axis, gathered), axis=axis)

    def _gather_group(self, x: mx.array) -> mx.array:
        """Return the shards of all ranks that split the same samples."""
        if self._group is not None:
            return self._group.all_gather(x)
        start = self._ranks.rank - self._index
        return self._ranks.all_gather(x)[start : start + self._plan.sp_degree]


def _slice(x: mx.array, axis: int, run: range) -> mx.array:
    return x[:, run.start : run.stop] if axis == 1 else x[:, :, run.start : run.stop]


def _pad(x: mx.array, axis: int, ranges: Sequence[range]) -> mx.array:
    """Pad x along `axis` to the longest of the ranges."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, max(map(len, ranges)) - x.shape[axis])
    return mx.pad(x, widths) if widths[axis][1] else x


def _unpad(
    shards: Sequence[mx.array] | mx.array, axis: int, ranges: Sequence[range]
) -> list[mx.array]:
    """Return the shards without padding and without repetitions of the last range."""
    own = [i for i, run in enumerate(ranges) if i == 0 or run != ranges[i - 1]]
    return [_slice(shards[i], axis, range(len(ranges[i]))) for i in own]
