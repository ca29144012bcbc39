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
from typing import Any, Protocol

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.request.modes import ParsedMode
from mlx_sora.sampling.base import (
    NOISE_TIME,
    Decision,
    State,
    Step,
    StepPolicy,
    Trajectory,
    restore,
    state_of,
)
from mlx_sora.sampling.loop import StepResult

#: Norms below this count as this, so that a velocity of zero has similarity 0 to any other.
TINY = 1e-8


class LeapRule(StepPolicy, Protocol):
    """Says when to leap."""

    def earliest(self, steps: int, /) -> int:
        """The first of `steps` steps that can be the leap, by index; known without running."""


@dataclass(frozen=True)
class FixedLeap:
    """Leap after `steps` ordinary steps: steps + 1 evaluations with a first-order sampler."""

    steps: int

    def earliest(self, steps: int, /) -> int:
        return self.steps

    def start(self, run: Trajectory, /) -> Decision:
        return _WhenReady(run, lambda step: step.index >= self.steps)


@dataclass(frozen=True)
class TimedLeap:
    """Leap from the first step that begins at flow time `time` or later (t falls from 1000)."""

    time: float

    def earliest(self, steps: int, /) -> int:
        return 0

    def start(self, run: Trajectory, /) -> Decision:
        return _WhenReady(run, lambda step: bool((step.t <= self.time).all().item()))


class _WhenReady:
    """Leaps when `due` says so and no frame waits."""

    def __init__(self, run: Trajectory, due: Callable[[Step], bool]) -> None:
        self._run, self._due = run, due

    def should_leap(self, step: Step, z: mx.array, v: mx.array, /) -> bool:
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

    def state(self) -> State:
        # JSON has no infinity.
        return {"left": self.left} | ({"best": self.best} if math.isfinite(self.best) else {})

    def restore(self, state: State, /) -> None:
        self.left, self.best = state["left"], state.get("best", self.best)


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

    def earliest(self, steps: int, /) -> int:
        return max(1, math.ceil(self.minimum * steps) - 1) + self.patience

    def start(self, run: Trajectory, /) -> SimilarVelocities:
        return SimilarVelocities(self, run)


class SimilarVelocities:
    """AdaptiveLeap at work in a run.

    similarities: for every step but the first, that of each sample.
    """

    def __init__(self, rule: AdaptiveLeap, run: Trajectory) -> None:
        batch = int(run.times.shape[1])
        self.similarities: list[list[float]] = []
        self._minimum = rule.minimum
        self._run = run
        self._patience = [Patience(rule.patience, rule.tolerance) for _ in range(batch)]
        self._ready = [False] * batch
        self._previous: mx.array | None = None

    def should_leap(self, step: Step, z: mx.array, v: mx.array, /) -> bool:
        previous, self._previous = self._previous, v
        if previous is None:
            return False
        values = similarity(v, previous, step)
        self.similarities.append(values)
        if step.index + 1 < self._minimum * step.total:
            return False
        for sample, unsettled in enumerate(self._unsettled(step)):
            if not unsettled and self._patience[sample].runs_out(values[sample]):
                self._ready[sample] = True
        return all(self._ready)

    def state(self) -> State:
        return {
            "similarities": list(self.similarities),
            "patience": [each.state() for each in self._patience],
            "ready": list(self._ready),
            "previous": self._previous,
        }

    def restore(self, state: State, /) -> None:
        self.similarities, self._ready = list(state["similarities"]), list(state["ready"])
        self._previous = state["previous"]
        for patience, known in zip(self._patience, state["patience"], strict=True):
            patience.restore(known)

    def _unsettled(self, step: Step) -> list[bool]:
        """Samples of which more frames will move, so that similarities do not compare yet."""
        late = waiting(self._run, step)
        if step.fresh is None:
            return late
        fresh: list[bool] = step.fresh.any(axis=1).tolist()  # type: ignore[assignment]
        return [a or b for a, b in zip(late, fresh, strict=True)]


@dataclass(frozen=True)
class ReferenceLeap:
    """The rule in the Python code of On-device Sora, for comparison with it.

    Looks at one frame of one channel of the first sample, row by row; `minimum` is the index of the
    first step that counts; the best similarity begins at 0.
    """

    patience: int = 3
    tolerance: float = 1e-3
    minimum: int = 14

    def earliest(self, steps: int, /) -> int:
        return max(1, self.minimum) + self.patience - 1

    def start(self, run: Trajectory, /) -> SimilarRows:
        return SimilarRows(self)


class SimilarRows:
    """ReferenceLeap at work in a run. similarities: for every step but the first."""

    def __init__(self, rule: ReferenceLeap) -> None:
        self.similarities: list[float] = []
        self.patience = Patience(rule.patience, rule.tolerance, best=0.0)
        self._minimum = rule.minimum
        self._previous: mx.array | None = None

    def should_leap(self, step: Step, z: mx.array, v: mx.array, /) -> bool:
        rows = v[0, 0, :, :, 0]
        previous, self._previous = self._previous, rows
        if previous is None:
            return False
        dot, own, other = (
            (a * b).sum(axis=1) for a, b in ((rows, previous), (rows, rows), (previous, previous))
        )
        value = float(_cosine(dot, own, other).mean().item())  # type: ignore[arg-type]
        self.similarities.append(value)
        return step.index >= self._minimum and self.patience.runs_out(value)

    def state(self) -> State:
        return {
            "similarities": list(self.similarities),
            "patience": self.patience.state(),
            "previous": self._previous,
        }

    def restore(self, state: State, /) -> None:
        self.similarities, self._previous = list(state["similarities"]), state["previous"]
        self.patience.restore(state["patience"])


def similarity(v: mx.array, previous: mx.array, step: Step) -> list[float]:
    """Cosine between two velocities [B, T, H, W, C] of each sample, over frames that move in both.

    `previous` is of the step before `step`.
    """
    pairs = ((v, previous), (v, v), (previous, previous))
    # In stages, as one long float32 sum would lose digits that the tolerance needs.
    products = [(a * b).sum(axis=(3, 4)).sum(axis=2) for a, b in pairs]
    if step.x_mask is not None:
        moving = step.x_mask if step.fresh is None else step.x_mask & ~step.fresh
        products = [mx.where(moving, product, 0.0) for product in products]
    values: list[float] = _cosine(*(p.sum(axis=1) for p in products)).tolist()  # type: ignore[assignment]
    return values


def waiting(run: Trajectory, step: Step) -> list[bool]:
    """Whether, of each sample, a frame that is held in `step` will move in a later one."""
    if run.mask is None or step.x_mask is None:
        return [False] * int(run.times.shape[1])
    moves_at_last = run.mask * NOISE_TIME >= run.times[-2][:, None]
    late: list[bool] = (moves_at_last & ~step.x_mask).any(axis=1).tolist()  # type: ignore[assignment]
    return late


def _cosine(dot: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """From the products of two vectors with each other and with themselves."""
    return dot / (mx.maximum(mx.sqrt(a), TINY) * mx.maximum(mx.sqrt(b), TINY))


class _Agreed:
    """A decision that all processes of a run take alike."""

    def __init__(self, decision: Decision, agree: Callable[[bool], bool]) -> None:
        self._decision, self._agree = decision, agree

    def should_leap(self, step: Step, z: mx.array, v: mx.array, /) -> bool:
        return self._agree(self._decision.should_leap(step, z, v))

    def state(self) -> State:
        return state_of(self._decision)

    def restore(self, state: State, /) -> None:
        restore(self._decision, state)


class Leap(Acceleration, StepPolicy):
    """A rule at work in the pipeline, and what came of it."""

    def __init__(self, rule: LeapRule, mode: str, job: ScheduleInfo) -> None:
        """mode: how the option spells the rule."""
        self._rule, self._job = rule, job
        self._decision: Decision | None = None
        self._end: StepResult | None = None
        if self._saved(rule.earliest(job.steps)) <= 0:
            self.warnings = (f"--lpl {mode} can save nothing in {job.steps} steps.",)

    @property
    def policy(self) -> StepPolicy:
        return self

    def start(self, run: Trajectory, /) -> Decision:
        self._decision = self._rule.start(run)
        return _Agreed(self._decision, self._job.agree)

    def on_step_end(self, result: StepResult) -> None:
        if result.leapt:
            self._end = result

    def record(self) -> dict[str, Any]:
        """leapt: whether; then steps before it, flow time t, and the evaluations it saved."""
        record: dict[str, Any] = {"leapt": self._end is not None}
        if self._end is not None:
            record["after_steps"] = self._end.step.index
            record["t"] = round(self._end.t, 3)
            record["evaluations_saved"] = self._saved(self._end.step.index)
        values = getattr(self._decision, "similarities", [])
        if values:
            record["similarities"] = [_rounded(value) for value in values]
        return record

    def summary(self) -> str:
        if self._end is None:
            return f"lpl: no leap in {self._job.steps} steps"
        return (
            f"lpl: leapt to the end from t = {self._end.t:.0f}, after {self._end.step.index} of "
            f"{self._job.steps} steps; {self._saved(self._end.step.index)} evaluations saved"
        )

    def _saved(self, index: int) -> int:
        """Evaluations that a leap in step `index` leaves out; it takes one itself."""
        return (self._job.steps - index) * self._job.evaluations - 1


def _rounded(value: float | list[float]) -> float | list[float]:
    return [round(v, 6) for v in value] if isinstance(value, list) else round(value, 6)


def start(mode: ParsedMode, job: ScheduleInfo) -> Leap:
    """What the option --lpl asks for, unless it is off."""
    return Leap(_rule(mode), mode.text, job)


def _rule(mode: ParsedMode) -> LeapRule:
    values = mode.values
    if mode.name == "fixed":
        return FixedLeap(int(values["steps"]))
    if mode.name == "t":
        return TimedLeap(values["time"])
    if mode.name == "adaptive":
        return AdaptiveLeap(int(values["patience"]), values["tolerance"], values["minimum"])
    return ReferenceLeap()
