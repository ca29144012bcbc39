"""LPL, linear proportional leap: once the flow is straight, go to its end in one step.

Rules that say when, each a StepPolicy: after a number of steps, at a flow time (which carries over
to other sizes, unlike a step), or adaptively, from the similarity of successive velocities, by the
text of the On-device Sora paper or by the rule in its code. Made for any sampler: a rule is asked
before a step, and sees the guided velocity the step begins with.

A batch leaps as one, when every sample says so. No rule but the reference's leaps while a frame
given with a strength still waits for its turn to move: it would stay as it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, Job
from mlx_sora.modes import Chosen
from mlx_sora.sampling.base import Decision, Run, Step, StepPolicy
from mlx_sora.sampling.loop import StepResult

#: Norms below this count as this, so that a velocity of zero has similarity 0 to any other.
TINY = 1e-8


@dataclass(frozen=True)
class FixedLeap:
    """Leap after `steps` ordinary steps: steps + 1 evaluations with a first-order sampler."""

    steps: int

    def start(self, run: Run, /) -> Decision:
        return _WhenReady(run, lambda step: step.index >= self.steps)


@dataclass(frozen=True)
class TimedLeap:
    """Leap from the first step that begins at flow time `time` or later (t falls from 1000)."""

    time: float

    def start(self, run: Run, /) -> Decision:
        return _WhenReady(run, lambda step: bool((step.t <= self.time).all().item()))


class _WhenReady:
    """Leaps when `due` says so and no frame waits."""

    def __init__(self, run: Run, due: Callable[[Step], bool]) -> None:
        self._run, self._due = run, due

    def leaps(self, step: Step, z: mx.array, v: mx.array, /) -> bool:
        return self._due(step) and not any(waiting(self._run, step))


class Patience:
    """Counts how often in a row a value has not risen above the best so far by `tolerance`."""

    def __init__(self, tries: int, tolerance: float, best: float = -math.inf) -> None:
        self._tries, self._tolerance = tries, tolerance
        self.best, self.left = best, tries

    def runs_out(self, value: float) -> bool:
        """Take the next value; whether that was the last try."""
        if value > self.best + self._tolerance:
            self.best, self.left = value, self._tries
        else:
            self.left -= 1
        return self.left <= 0


@dataclass(frozen=True)
class AdaptiveLeap:
    """Leap when the velocity has stopped becoming steadier; the text of the paper.

    The similarity of a step is the cosine between its guided velocity and the one before, over the
    whole tensor (frames that are held do not count). It is followed from the step that brings the
    share of velocities seen to `minimum`; once it has failed `patience` times in a row to exceed
    its best by more than `tolerance`, the sample is ready, and stays so while others are not.
    """

    patience: int = 3
    tolerance: float = 1e-4
    minimum: float = 0.5

    def start(self, run: Run, /) -> SimilarVelocities:
        return SimilarVelocities(self, run)


class SimilarVelocities:
    """AdaptiveLeap at work in a run.

    similarities: for every step but the first, that of each sample.
    """

    def __init__(self, rule: AdaptiveLeap, run: Run) -> None:
        batch = int(run.times.shape[1])
        self.similarities: list[list[float]] = []
        self._minimum = rule.minimum
        self._run = run
        self._patience = [Patience(rule.patience, rule.tolerance) for _ in range(batch)]
        self._ready = [False] * batch
        self._previous: mx.array | None = None

    def leaps(self, step: Step, z: mx.array, v: mx.array, /) -> bool:
        previous, self._previous = self._previous, v
        if previous is None:
            return False
        values = similarity(v, previous, step)
        self.similarities.append(values)
        if step.index + 1 < self._minimum * step.total:
            return False
        # A frame that has just begun to move makes two velocities incomparable.
        unsettled = waiting(self._run, step, begun=True)
        for sample, value in enumerate(values):
            if not unsettled[sample] and self._patience[sample].runs_out(value):
                self._ready[sample] = True
        return all(self._ready)


@dataclass(frozen=True)
class ReferenceLeap:
    """The rule in the Python code of On-device Sora, for comparison with it.

    Looks at one frame of one channel of the first sample, row by row; `minimum` is the index of the
    first step that counts; the best similarity begins at 0.
    """

    patience: int = 3
    tolerance: float = 1e-3
    minimum: int = 14

    def start(self, run: Run, /) -> SimilarRows:
        return SimilarRows(self)


class SimilarRows:
    """ReferenceLeap at work in a run. similarities: for every step but the first."""

    def __init__(self, rule: ReferenceLeap) -> None:
        self.similarities: list[float] = []
        self.patience = Patience(rule.patience, rule.tolerance, best=0.0)
        self._minimum = rule.minimum
        self._previous: mx.array | None = None

    def leaps(self, step: Step, z: mx.array, v: mx.array, /) -> bool:
        rows = v[0, 0, :, :, 0]
        previous, self._previous = self._previous, rows
        if previous is None:
            return False
        value = float(_cosine(*(x[..., None] for x in _products(rows, previous))).mean().item())
        self.similarities.append(value)
        return step.index >= self._minimum and self.patience.runs_out(value)
