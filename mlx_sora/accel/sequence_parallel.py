"""Guidance and sequence parallel: several processes make one evaluation of the transformer.

Each half of guidance goes to half of the ranks. Those of a half divide the frames in spatial
blocks, which look within a frame, and the places of a frame in temporal blocks, which look along
time; between the two each gets what it lacks from the others. Cross-attention and MLP see one
token at a time and need nothing. All else (noise, sampler, caches, decisions) every rank does
alike, so that what is known after a step is the same everywhere and that of a single process.
Dimension letters: B batch, T frames, S tokens per frame, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_sora.distributed.group import Ranks
from mlx_sora.distributed.partition import ParallelPlan, split_evenly
from mlx_sora.models.hooks import Shard, Sharding, Unsharded


class SequenceParallel(Sharding):
    """`ranks` in `halves` groups, each for its part of the batch; fills the seam Layout."""

    def __init__(self, ranks: Ranks, halves: int = 1) -> None:
        """Raises ValueError where the ranks do not make equal groups."""
        if ranks.size % halves:
            raise ValueError(f"{ranks.size} ranks do not make {halves} equal groups")
        self._ranks = ranks
        parts = ranks.size // halves
        self._group = ranks.split(ranks.rank // parts) if 1 < parts < ranks.size else None
        self.division = ParallelPlan(
            ranks.size, halves, subgroups=self._group is not None, ring=ranks.ring
        )

    def shard(self, shape: Sequence[int], stride: int) -> Shard:
        batch, frames, tokens = shape
        division = self.division.for_batch(batch)
        if division.ranks == 1:
            return Unsharded()
        half, part = divmod(self._ranks.rank, division.sp_degree)
        rows = batch // division.cfg_degree
        return _TokenShard(
            self._ranks,
            self._group if division.subgroups else None,
            division.pairwise,
            slice(half * rows, (half + 1) * rows),
            part,
            split_evenly(frames, division.sp_degree, stride),
            split_evenly(tokens, division.sp_degree),
        )


class _TokenShard:
    """Part `part` of those that `frames` and `places` are cut into, for the samples `rows`.

    group: those that share the samples, where they can be spoken to alone; paired: these are two
    neighbours; else everybody is told everything.
    """

    def __init__(
        self,
        ranks: Ranks,
        group: Ranks | None,
        paired: bool,
        rows: slice,
        part: int,
        frames: Sequence[range],
        places: Sequence[range],
    ) -> None:
        self.batch_slice = rows
        self._ranks, self._group, self._paired = ranks, group, paired
        self._frames, self._places, self._part = frames, places, part

    def scatter(self, x: mx.array) -> mx.array:
        return self.scatter_frames(x[self.batch_slice])

    def scatter_frames(self, x: mx.array) -> mx.array:
        return x if x.shape[1] == 1 else _cut(x, 1, self._frames[self._part])

    def to_temporal(self, x: mx.array) -> mx.array:
        return self._all_to_all(x, 1, self._frames, self._places)

    def to_spatial(self, x: mx.array) -> mx.array:
        return self._all_to_all(x, 2, self._places, self._frames)

    def gather(self, x: mx.array) -> mx.array:
        parts, count = self._ranks.all_gather(_padded(x, 2, self._places)), len(self._places)
        halves = [
            mx.concatenate(_used(parts[i : i + count], 2, self._places), axis=2)
            for i in range(0, len(parts), count)
        ]
        return mx.concatenate(halves)

    def _all_to_all(
        self, x: mx.array, axis: int, held: Sequence[range], wanted: Sequence[range]
    ) -> mx.array:
        """From its run of `held` along `axis` to all of them, at its run of `wanted` along the
        other axis.
        """
        if len(held) == 1:
            return x
        across, own = 3 - axis, wanted[self._part]
        if self._paired:
            other = 1 - self._part
            shape = list(x.shape)
            shape[axis], shape[across] = len(held[other]), len(own)
            theirs = self._ranks.exchange(_cut(x, across, wanted[other]), shape)
            parts = [_cut(x, across, own), theirs]
            parts = parts if self._part == 0 else parts[::-1]
        else:
            everything = self._gather_group(_padded(x, axis, held))
            parts = [_cut(part, across, own) for part in everything]
        return mx.concatenate(_used(parts, axis, held), axis=axis)

    def _gather_group(self, x: mx.array) -> mx.array:
        """The parts x of all that share the samples, in order."""
        if self._group is not None:
            return self._group.all_gather(x)
        count = len(self._frames)
        first = self._ranks.rank // count * count
        return self._ranks.all_gather(x)[first : first + count]


def _cut(x: mx.array, axis: int, run: range) -> mx.array:
    """A run of frames (axis 1) or places (axis 2)."""
    return x[:, run.start : run.stop] if axis == 1 else x[:, :, run.start : run.stop]


def _padded(x: mx.array, axis: int, runs: Sequence[range]) -> mx.array:
    """x as long along `axis` as the longest of the runs that ranks have."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, max(map(len, runs)) - x.shape[axis])
    return mx.pad(x, widths) if widths[axis][1] else x


def _used(parts: Sequence[mx.array] | mx.array, axis: int, runs: Sequence[range]) -> list[mx.array]:
    """The parts without padding, those that stand for others left out."""
    own = [i for i, run in enumerate(runs) if i == 0 or run != runs[i - 1]]
    return [_cut(parts[i], axis, range(len(runs[i]))) for i in own]
