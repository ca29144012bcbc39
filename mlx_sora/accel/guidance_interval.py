"""Guidance interval: guidance only in steps that start within a span of flow time.

Outside of it the velocity is the prediction with prompt, which halves the work (arXiv 2404.07724).
Near noise guidance reduces variety, near the end it changes little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.request.techniques import GuidanceInterval
from mlx_sora.sampling.base import State, Step
from mlx_sora.sampling.guidance import CFGPredictions
from mlx_sora.sampling.loop import StepResult


class IntervalGuidance(Acceleration):
    """Guidance in the steps of one run that start within the interval. Fills GuidancePolicy."""

    def __init__(self, config: GuidanceInterval, schedule: ScheduleInfo) -> None:
        self._steps = self._guided_steps = 0
        self._guided = schedule.guided
        outside = (i for i, t in enumerate(schedule.times) if not config.low <= t <= config.high)
        self.cond_only_steps = frozenset(outside if schedule.guided else ())
        if not schedule.guided:
            self.warnings = ("--guidance-interval changes nothing: there is no guidance.",)
        elif len(self.cond_only_steps) == schedule.steps:
            self.warnings = ("--guidance-interval covers no step: there will be no guidance.",)

    @property
    def guidance(self) -> IntervalGuidance:
        return self

    def predict_uncond(self, step: Step, /) -> Callable[[mx.array], mx.array] | None:
        return (lambda cond: cond) if step.index in self.cond_only_steps else None

    def update(self, step: Step, predictions: CFGPredictions, /) -> None:
        """Do nothing: the policy has no cache."""

    def on_step_end(self, result: StepResult) -> None:
        self._steps += 1
        self._guided_steps += self._guided and result.step.index not in self.cond_only_steps

    def state(self) -> State:
        return {"made": self._steps, "guided": self._guided_steps}

    def restore(self, state: State, /) -> None:
        self._steps, self._guided_steps = state["made"], state["guided"]

    def record(self) -> dict[str, Any]:
        """Return guided_steps, and all finished `steps`."""
        return {"guided_steps": self._guided_steps, "steps": self._steps}

    def summary(self) -> str:
        return f"guidance_interval: guidance in {self._guided_steps} of {self._steps} steps"
