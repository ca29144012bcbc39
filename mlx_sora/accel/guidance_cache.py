"""Guidance cache: compute the unconditional prediction in every n-th step only, and reuse it.

A reused prediction is the one with prompt plus the difference of both in the last step that
computed both. Low and high frequencies of the difference are cached apart, each with a weight of
its own; CFG-Cache of FasterCache (arXiv 2410.19355).
Dimension letters: B batch, T frames, H W latent height and width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.request.techniques import GuidanceCache
from mlx_sora.sampling.base import State, Step
from mlx_sora.sampling.guidance import CFGPredictions

#: Frequencies below this share of the shorter side are low.
RADIUS = 1 / 5

#: Shares of the run: low frequencies are boosted before the first, high ones from the second on.
LOW_UNTIL, HIGH_FROM = 5 / 6, 2 / 3


class Bands(NamedTuple):
    """Low and high frequencies of an array [B, T, H, W, C]; their sum is the array."""

    low: mx.array
    high: mx.array


class UncondCache(Acceleration):
    """Cache of the unconditional predictions of one run. Fills GuidancePolicy."""

    def __init__(self, config: GuidanceCache, schedule: ScheduleInfo) -> None:
        self._boost = config.boost
        self.cond_only_steps = _cond_only_steps(config, schedule)
        self._difference: Bands | None = None
        self._evaluations = self._reused = 0
        if not schedule.guided:
            self.warnings = ("--guidance-cache changes nothing: there is no guidance.",)
        elif not self.cond_only_steps:
            self.warnings = (f"--guidance-cache saves nothing in {schedule.steps} steps.",)

    @property
    def guidance(self) -> UncondCache:
        return self

    def predict_uncond(self, step: Step, /) -> Callable[[mx.array], mx.array] | None:
        self._evaluations += 1
        is_due = step.index in self.cond_only_steps and step.fresh is None
        if self._difference is None or not is_due:
            return None
        self._reused += 1
        low, high = self._difference
        if step.index < LOW_UNTIL * step.total:
            low = self._boost * low
        if step.index >= HIGH_FROM * step.total:
            high = self._boost * high
        return lambda cond: cond + (low + high)

    def update(self, step: Step, predictions: CFGPredictions, /) -> None:
        cond, uncond = predictions
        self._difference = split_bands(uncond - cond)
        mx.eval(*self._difference)

    def state(self) -> State:
        difference = {} if self._difference is None else self._difference._asdict()
        return {"halves": self._evaluations, "spared": self._reused, "difference": difference}

    def restore(self, state: State, /) -> None:
        self._evaluations, self._reused = state["halves"], state["spared"]
        self._difference = Bands(**state["difference"]) if state["difference"] else None

    def record(self) -> dict[str, Any]:
        """Return guided: evaluations with guidance; halves_saved: those that used the cache."""
        return {"guided": self._evaluations, "halves_saved": self._reused}

    def summary(self) -> str:
        return (
            "guidance_cache: the unconditional prediction was computed in "
            f"{self._evaluations - self._reused} of {self._evaluations} evaluations"
        )


def _cond_only_steps(config: GuidanceCache, schedule: ScheduleInfo) -> frozenset[int]:
    """Return the steps that reuse the unconditional prediction.

    Steps that run no block cannot refresh the cache, and steps without guidance do not count.
    """
    first = math.ceil(config.after * schedule.steps)
    found, last = set[int](), None
    for step in range(schedule.first_step, schedule.steps if schedule.guided else 0):
        if step in schedule.cond_only_steps:
            continue
        is_due = last is None or step < first or step - last >= config.each
        if is_due and step not in schedule.skipped_steps:
            last = step
        elif last is not None and step >= first:
            found.add(step)
    return frozenset(found)


def split_bands(x: mx.array) -> Bands:
    """Return the low and high frequencies of each frame and channel of x [B, T, H, W, C]."""
    height, width = x.shape[2:4]
    rows, columns = _frequencies(height), _frequencies(width)
    radius = int(min(height, width) * RADIUS)
    inside = rows[:, None] ** 2 + columns[None] ** 2 <= radius**2
    # On the CPU: not every backend has this transform, and the tensor is small.
    spectrum = mx.fft.fft2(x, axes=(2, 3), stream=mx.cpu)
    with mx.stream(mx.cpu):
        low = mx.fft.ifft2(spectrum * inside[:, :, None], axes=(2, 3)).real.astype(x.dtype)
    return Bands(low, x - low)


def _frequencies(size: int) -> mx.array:
    """Return the waves per side of each bin in a spectrum of `size` bins."""
    bins = mx.arange(size)
    return mx.minimum(bins, size - bins)
