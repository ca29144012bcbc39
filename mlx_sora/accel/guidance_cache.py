"""Guidance cache: after a while, the half without prompt is run in every m-th step only.

In between it is the half with prompt plus the difference of both in the last full step, whose low
and high frequencies are kept apart so that each can be given more weight; CFG-Cache of FasterCache
(arXiv 2410.19355). Dimension letters: B batch, T frames, H W latent height and width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.request.modes import ParsedMode
from mlx_sora.sampling.base import State, Step
from mlx_sora.sampling.guidance import CFGPredictions, GuidancePolicy
from mlx_sora.sampling.loop import StepResult

#: Frequencies below this share of the shorter side are low.
RADIUS = 1 / 5

#: Shares of the run: low frequencies get the boost until the one, high ones from the other on.
LOW_UNTIL, HIGH_FROM = 5 / 6, 2 / 3

_BANDS = ("low", "high")


class GuidanceCache(Acceleration):
    """Both halves in the first `after` of the steps, then every `each`-th; fills GuidancePolicy.

    boost: weight of the difference's low frequencies at first, of the high ones at last.
    Steps that run no block are not counted as full ones, nor those without guidance.
    """

    def __init__(self, each: int, after: float, boost: float, job: ScheduleInfo) -> None:
        self._boost, self._job = boost, job
        self.cond_only_steps = _alone(each, math.ceil(after * job.steps), job)
        self._difference: CFGPredictions | None = None
        self._halves = self._spared = 0
        if not job.guided:
            self.warnings = ("--guidance-cache changes nothing: there is no guidance.",)
        elif not self.cond_only_steps:
            self.warnings = (f"--guidance-cache saves nothing in {job.steps} steps.",)

    @property
    def guidance(self) -> GuidancePolicy:
        return self

    def predict_uncond(self, step: Step, /) -> Callable[[mx.array], mx.array] | None:
        self._halves += 1
        if (
            step.index not in self.cond_only_steps
            or self._difference is None
            or step.fresh is not None
        ):
            return None
        self._spared += 1
        low, high = self._difference
        if step.index < LOW_UNTIL * step.total:
            low = self._boost * low
        if step.index >= HIGH_FROM * step.total:
            high = self._boost * high
        return lambda with_prompt: with_prompt + (low + high)

    def update(self, step: Step, halves: CFGPredictions, /) -> None:
        with_prompt, without = halves
        self._difference = _split(without - with_prompt)
        mx.eval(*self._difference)

    def on_step_end(self, result: StepResult) -> None:
        """Everything is known from the evaluations."""

    def state(self) -> State:
        kept = {} if self._difference is None else dict(zip(_BANDS, self._difference, strict=True))
        return {"halves": self._halves, "spared": self._spared, "difference": kept}

    def restore(self, state: State, /) -> None:
        self._halves, self._spared = state["halves"], state["spared"]
        kept = state["difference"]
        self._difference = (kept["low"], kept["high"]) if kept else None

    def record(self) -> dict[str, Any]:
        """guided: evaluations with guidance; halves_saved: of them, without the second half."""
        return {"guided": self._halves, "halves_saved": self._spared}

    def summary(self) -> str:
        return (
            f"guidance_cache: the half without prompt was run in {self._halves - self._spared} of "
            f"{self._halves} evaluations"
        )


def _alone(each: int, after: int, job: ScheduleInfo) -> frozenset[int]:
    """Steps with the half with prompt alone."""
    alone, last = set(), None
    for step in range(job.steps if job.guided else 0):
        if step in job.cond_only_steps:
            continue
        due = last is None or step < after or step - last >= each
        if due and step not in job.skipped_steps:
            last = step
        elif last is not None and step >= after:
            alone.add(step)
    return frozenset(alone)


def _split(x: mx.array) -> CFGPredictions:
    """Low and high frequencies of each frame and channel of x [B, T, H, W, C]."""
    height, width = x.shape[2:4]
    rows, columns = _frequencies(height), _frequencies(width)
    radius = int(min(height, width) * RADIUS)
    inside = rows[:, None] ** 2 + columns[None] ** 2 <= radius**2
    # On the CPU: not every backend has this transform, and the tensor is small.
    spectrum = mx.fft.fft2(x, axes=(2, 3), stream=mx.cpu)
    with mx.stream(mx.cpu):
        low = mx.fft.ifft2(spectrum * inside[:, :, None], axes=(2, 3)).real.astype(x.dtype)
    return low, x - low


def _frequencies(count: int) -> mx.array:
    """Whole waves per side, of each place in a spectrum of `count`."""
    places = mx.arange(count)
    return mx.minimum(places, count - places)


def start(mode: ParsedMode, job: ScheduleInfo) -> GuidanceCache:
    """What the option --guidance-cache asks for, unless it is off."""
    values = mode.values
    return GuidanceCache(int(values["each"]), values["after"], values["boost"], job)
