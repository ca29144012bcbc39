"""Guidance interval: guidance only in steps that begin within a span of flow time.

Outside of it the velocity is that with the prompt, one half of the work (arXiv 2404.07724). Near
noise guidance takes variety away, near the end it changes little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.errors import UsageError
from mlx_sora.request.modes import ParsedMode
from mlx_sora.sampling.base import State, Step
from mlx_sora.sampling.guidance import CFGPredictions, GuidancePolicy
from mlx_sora.sampling.loop import StepResult


class GuidanceInterval(Acceleration):
    """Guidance where low <= t <= high, t being the flow time that a step begins at."""

    def __init__(self, low: float, high: float, job: ScheduleInfo) -> None:
        self._low, self._high, self._steps = low, high, job.steps
        self._guided = 0
        self._made = 0
        outside = (i for i, t in enumerate(job.times) if not low <= t <= high)
        self.cond_only_steps = frozenset(outside if job.guided else ())
        if not job.guided:
            self.warnings = ("--guidance-interval changes nothing: there is no guidance.",)
        elif len(self.cond_only_steps) == job.steps:
            self.warnings = ("--guidance-interval covers no step: there will be no guidance.",)

    @property
    def guidance(self) -> GuidancePolicy:
        return self

    def predict_uncond(self, step: Step, /) -> Callable[[mx.array], mx.array] | None:
        return (lambda with_prompt: with_prompt) if step.index in self.cond_only_steps else None

    def update(self, step: Step, halves: CFGPredictions, /) -> None:
        """Nothing is kept."""

    def on_step_end(self, result: StepResult) -> None:
        self._made += 1
        self._guided += result.step.index not in self.cond_only_steps

    def state(self) -> State:
        return {"made": self._made, "guided": self._guided}

    def restore(self, state: State, /) -> None:
        self._made, self._guided = state["made"], state["guided"]

    def record(self) -> dict[str, Any]:
        """guided_steps, of `steps` that were made."""
        return {"guided_steps": self._guided, "steps": self._made}

    def summary(self) -> str:
        return f"guidance_interval: guidance in {self._guided} of {self._made} steps"


def start(mode: ParsedMode, job: ScheduleInfo) -> GuidanceInterval:
    """What the option --guidance-interval asks for, unless it is off."""
    low, high = mode.values["low"], mode.values["high"]
    if low > high:
        raise UsageError(
            f"--guidance-interval {mode.text} is empty.", "Give the lower flow time first."
        )
    return GuidanceInterval(low, high, job)
