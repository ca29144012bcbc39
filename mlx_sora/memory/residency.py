"""How many of a network's blocks may stay in memory, from a budget and from what was measured.

The arithmetic is pure (`choose`, `spread`); `Residency` feeds it with readings of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.memory.limits import current_rss
from mlx_sora.memory.profiles import format_bytes

#: Bytes of a process outside MLX where the system does not tell (macOS): interpreter and libraries.
ASSUMED_NON_MLX_BYTES = 256 << 20


@dataclass(frozen=True)
class MemorySample:
    """Bytes now. active, peak: MLX's, the peak since it was last reset; outside: not MLX's."""

    active: int
    peak: int
    non_mlx: int


@dataclass(frozen=True)
class BlockSizes:
    """Bytes of a network's blocks: each in memory, and the most that loading one takes."""

    nbytes: Sequence[int]
    load_peak_bytes: int

    @property
    def largest(self) -> int:
        return max(self.nbytes)


@dataclass(frozen=True)
class ResidencyPlan:
    """What fits: blocks that stay, and whether another may be loaded while one computes."""

    resident: int
    prefetch: bool


def choose_resident(available: int, blocks: BlockSizes) -> ResidencyPlan:
    """What fits into `room` bytes, which are there for blocks alone.

    All blocks, or one that computes, one on its way and as many more as there is space for. Where
    that is not even two, nothing is loaded ahead; whether one fits is for the planner to say.
    """
    count, size = len(blocks.nbytes), blocks.largest
    if available >= sum(blocks.nbytes) + blocks.load_peak_bytes - size:
        return ResidencyPlan(count, prefetch=True)
    spare = available - size - blocks.load_peak_bytes
    return ResidencyPlan(min(count - 1, max(0, spare // size)), prefetch=spare >= 0)


def evenly_spaced(num_blocks: int, count: int) -> frozenset[int]:
    """`count` of `blocks` indices, evenly apart.

    Between two streamed blocks there is then as much computing as can be for the loader to hide
    behind; were the first `count` to stay, the others would wait for the disk one after the other.
    """
    count = min(count, num_blocks)
    return frozenset(i * num_blocks // count for i in range(count))


def sample_memory() -> MemorySample:
    """This process now."""
    active, rss = mx.get_active_memory(), current_rss()
    unknown = ASSUMED_NON_MLX_BYTES if rss is None else rss - active - mx.get_cache_memory()
    return MemorySample(active, mx.get_peak_memory(), max(0, unknown))


class Residency:
    """Decides what stays by measuring the first two blocks of a pass, each alone in memory.

    The first shows the peak; the second also what a block leaves behind (its text keys and values),
    which the others will too. budget: bytes the whole process may use. cache_limit: MLX's, counted
    in full. reserve: bytes to leave for what comes later and cannot be measured here. throttled:
    MLX will be held back (see `planner.within`), so it is while measuring.
    """

    def __init__(
        self,
        budget: int,
        *,
        cache_limit: int = 0,
        reserve: int = 0,
        throttled: bool = False,
        sample: Callable[[], MemorySample] = sample_memory,
        reset_peak: Callable[[], None] = mx.reset_peak_memory,
        set_limit: Callable[[int], int] = mx.set_memory_limit,
    ) -> None:
        self.budget = budget - cache_limit - reserve
        #: Largest peak of MLX's memory so far: measuring resets MLX's own record of it.
        self.peak = 0
        self._read, self._reset, self._limit = sample, reset_peak, set_limit
        self._first: MemorySample | None = None
        self._throttled = throttled
        self._limit_before: int | None = None

    def start_measuring(self) -> None:
        """A pass to be measured starts; no block is in memory."""
        self.peak = max(self.peak, self._read().peak)
        self._reset()
        self._first = None
        if self._throttled:
            self._limit_before = self._limit(0)

    def record_block(self, index: int, blocks: BlockSizes) -> ResidencyPlan | None:
        """Block `index` (0, then 1) has computed and is in memory still: the decision, if ready."""
        reading = self._read()
        self.peak = max(self.peak, reading.peak)
        count = len(blocks.nbytes)
        if index == 0 and count > 1:
            self._first = reading
            return None
        self.stop_measuring()
        growth = max(0, reading.active - self._first.active) if self._first else 0
        work = reading.peak - min(blocks.nbytes[: index + 1])
        to_come = growth * (count - index - 1)
        return choose_resident(self.budget - work - to_come - reading.non_mlx, blocks)

    def stop_measuring(self) -> None:
        """Nothing more to measure now: MLX schedules as before."""
        if self._limit_before is not None:
            self._limit(self._limit_before)
            self._limit_before = None


class BudgetMonitor:
    """Looks at the process between two pieces of work of `stage`. budget: None never minds.

    A run that has outgrown its budget takes less at a time and says so, once; it is not ended,
    since whatever took the memory (the caller's own data, other libraries) may well be gone by
    the time it matters. Where memory is at an end, MLX's own error comes (`device_errors`).
    """

    def __init__(
        self, stage: str, budget: int | None, sample: Callable[[], MemorySample] = sample_memory
    ) -> None:
        self._stage, self._budget, self._read = stage, budget, sample
        self._told = False

    def check(self, shrink: Callable[[], bool]) -> str | None:
        """Have `lessen` act where the budget is exceeded; the warning, the first time.

        lessen: makes the next piece of work smaller, if it can.
        """
        if self._budget is None:
            return None
        reading = self._read()
        used = reading.non_mlx + max(reading.peak, reading.active + mx.get_cache_memory())
        if used <= self._budget:
            return None
        less = shrink()
        mx.clear_cache()
        if self._told:
            return None
        self._told = True
        follows = "it goes on with less at a time" if less else "nothing is left to save"
        return (
            f"Stage {self._stage} has come to {format_bytes(used)}, over the budget of "
            f"{format_bytes(self._budget)}: {follows}."
        )
