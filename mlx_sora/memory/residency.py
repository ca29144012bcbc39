"""Keep a running process within its budget: resident blocks, and a monitor that shrinks the work.

`choose_resident` and `evenly_spaced` are pure arithmetic. `Residency` and `BudgetMonitor` feed them
with samples of the memory of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.memory.limits import process_memory, restore_memory_limit, set_memory_limit
from mlx_sora.memory.profiles import format_bytes
from mlx_sora.runtime.device import backend

#: Bytes of a process outside MLX on systems that do not report them.
ASSUMED_NON_MLX_BYTES = 256 << 20


@dataclass(frozen=True)
class MemorySample:
    """Bytes of this process: MLX's, their peak since the last reset, and those outside MLX."""

    active: int
    peak: int
    non_mlx: int


@dataclass(frozen=True)
class ResidencyPlan:
    """Number of resident blocks; prefetch: the next block may be loaded during computation."""

    resident: int
    prefetch: bool


def choose_resident(available: int, blocks: Sequence[int], load_peak_bytes: int) -> ResidencyPlan:
    """Choose the blocks that fit into `available` bytes.

    All of them, or the one that computes, one that is prefetched and as many more as fit. Without
    space for two there is no prefetch. The planner has already checked that one fits.

    blocks: bytes of each in memory. load_peak_bytes: peak while one is loaded.
    """
    count, size = len(blocks), max(blocks)
    if available >= sum(blocks) + load_peak_bytes - size:
        return ResidencyPlan(count, prefetch=True)
    spare = available - size - load_peak_bytes
    return ResidencyPlan(min(count - 1, max(0, spare // size)), prefetch=spare >= 0)


def evenly_spaced(num_blocks: int, count: int) -> frozenset[int]:
    """Return `count` evenly spaced indices of `num_blocks`.

    Every load then has as much computation as possible to hide behind. If the first `count` blocks
    stayed instead, the others would wait for the disk one after the other.
    """
    count = min(count, num_blocks)
    return frozenset(i * num_blocks // count for i in range(count))


def sample_memory() -> MemorySample:
    """Sample the memory of this process, once the GPU has freed what it no longer uses.

    On CUDA only MLX's: the GPU has memory of its own.
    """
    mx.synchronize()
    active = mx.get_active_memory()
    if backend() == "cuda":
        return MemorySample(active, mx.get_peak_memory(), 0)
    process = process_memory()
    non_mlx = ASSUMED_NON_MLX_BYTES if process is None else process - active - mx.get_cache_memory()
    return MemorySample(active, mx.get_peak_memory(), max(0, non_mlx))


class Residency:
    """Measures the first two blocks of a pass, each alone in memory, and decides what stays.

    The first block shows the peak. The second also shows what a block leaves behind (its text keys
    and values), as all others will.

    budget: bytes of the whole process.
    cache_limit: MLX's, counted in full.
    reserve: bytes that are allocated after the measurement.
    throttled: MLX's scheduler is throttled (see `stage_limits`), also during the measurement.
    """

    def __init__(
        self,
        budget: int,
        *,
        cache_limit: int = 0,
        reserve: int = 0,
        throttled: bool = False,
        sample: Callable[[], MemorySample] = sample_memory,
    ) -> None:
        self.budget = budget - cache_limit - reserve
        #: Largest peak of MLX's memory so far. Measuring resets MLX's own.
        self.peak = 0
        self._sample = sample
        self._first: MemorySample | None = None
        self._throttled = throttled
        self._previous_limit: int | None = None

    def start_measuring(self) -> None:
        """Begin a measured pass. No block may be in memory."""
        self.peak = max(self.peak, self._sample().peak)
        mx.reset_peak_memory()
        self._first = None
        if self._throttled:
            self._previous_limit = set_memory_limit(0)

    def record_block(
        self, index: int, blocks: Sequence[int], load_peak_bytes: int
    ) -> ResidencyPlan | None:
        """Record that block `index` (0, then 1) has computed and is in memory; decide after both.

        Returns None before the second block.
        """
        sample = self._sample()
        self.peak = max(self.peak, sample.peak)
        if index == 0 and len(blocks) > 1:
            self._first = sample
            return None
        self.stop_measuring()
        growth = max(0, sample.active - self._first.active) if self._first else 0
        activations = sample.peak - min(blocks[: index + 1])
        future_growth = growth * (len(blocks) - index - 1)
        available = self.budget - activations - future_growth - sample.non_mlx
        return choose_resident(available, blocks, load_peak_bytes)

    def stop_measuring(self) -> None:
        """Restore MLX's memory limit."""
        restore_memory_limit(self._previous_limit)
        self._previous_limit = None


class BudgetMonitor:
    """Compares the memory of the process with its budget between two pieces of a stage's work.

    A run over its budget continues with smaller pieces and warns once. It does not end, since
    memory of others (the caller's data, other libraries) may be freed soon. If memory does run out,
    MLX raises (see `explain_device_error`).

    budget: bytes, or None to disable the check.
    """

    def __init__(
        self, stage: str, budget: int | None, sample: Callable[[], MemorySample] = sample_memory
    ) -> None:
        self._stage, self._budget, self._sample = stage, budget, sample
        self._warned = False

    def check(self, shrink: Callable[[], bool]) -> str | None:
        """Call `shrink` if the process is over its budget; return a warning the first time.

        shrink: makes the next piece of work smaller; returns False if it cannot.
        """
        if self._budget is None:
            return None
        sample = self._sample()
        used = sample.non_mlx + max(sample.peak, sample.active + mx.get_cache_memory())
        if used <= self._budget:
            return None
        smaller = shrink()
        mx.synchronize()
        mx.clear_cache()
        if self._warned:
            return None
        self._warned = True
        action = "continuing with smaller pieces" if smaller else "nothing is left to reduce"
        return (
            f"Stage {self._stage} reached {format_bytes(used)}, over the budget of "
            f"{format_bytes(self._budget)}: {action}."
        )
