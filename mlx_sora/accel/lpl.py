"""LPL, linear proportional leap: once the flow is straight, go to t = 0 in one step.

One class per rule: after a number of steps, at a flow time (which other sizes share, unlike a step
number), or once successive velocities are similar. The last one exists in two forms: the text of
the On-device Sora paper, and the rule in its code. A rule works with any sampler: it sees the
guided velocity at the start of a step. With order 1 the leap is no straight line: it goes along the
velocity that the last two foretell for what is left (see `Leap.leap_velocity`).

A batch leaps when all its samples are ready. While a given frame waits for its first step, only
the rule of the reference leaps; any other leap would leave that frame as it was given.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.request.techniques import Lpl
from mlx_sora.sampling.base import NOISE_TIME, State, Step
from mlx_sora.sampling.loop import StepResult

#: Lower limit of norms in a cosine: a velocity of zero has similarity 0 to any other.
TINY = 1e-8


class Leap(Acceleration):
    """Leap of one run and its account. Subclasses hold the rule. Fills `LeapPolicy`."""

    def __init__(self, config: Lpl, schedule: ScheduleInfo) -> None:
        self._config, self._schedule = config, schedule
        self._end: StepResult | None = None
        #: Time [B] and velocity of this step and of the one before, of which order 1 has need.
        self._latest: tuple[mx.array, mx.array] | None = None
        self._earlier: tuple[mx.array, mx.array] | None = None
        #: Similarity of successive velocities, for every step but the first, if the rule uses it.
        self.similarities: list[Any] = []
        if self._saved(self.earliest) <= 0:
            self.warnings = (f"--lpl {config} can save nothing in {schedule.steps} steps.",)

    @property
    @abstractmethod
    def earliest(self) -> int:
        """Index of the first step that can be the leap."""

    @abstractmethod
    def decide(self, step: Step, v: mx.array) -> bool:
        """Return whether the rule leaps in this step, from velocity v [B, T, H, W, C]."""

    @property
    def policy(self) -> Leap:
        return self

    def should_leap(self, step: Step, z: mx.array, v: mx.array, /) -> bool:
        if self._config.order:
            self._earlier, self._latest = self._latest, (step.t, v)
        return self._schedule.agree(self.decide(step, v))

    def leap_velocity(self, step: Step, v: mx.array, /) -> mx.array:
        """Return v, or with order 1 its mean over the rest of the flow, as far as it is foreseen.

        On a parabola that mean is v + dv/dt · t / 2. Measured flows curve less and less: there
        1 - t / 1000 of this is right. Frames that did not move in both steps go along v.
        """
        if self._earlier is None:
            return v
        t, before = step.t / NOISE_TIME, self._earlier[0] / NOISE_TIME
        share = t / 2 * (1 - t) / (before - t)
        change = (v - self._earlier[1]) * share.reshape(-1, 1, 1, 1, 1)
        moving = _moving(step)
        return v + (
            change if moving is None else mx.where(moving[:, :, None, None, None], change, 0.0)
        )

    def state(self) -> State:
        return {} if self._latest is None else {"latest": list(self._latest)}

    def restore(self, state: State, /) -> None:
        self._latest = tuple(state["latest"]) if "latest" in state else None

    def on_step_end(self, result: StepResult) -> None:
        if result.is_leap:
            self._end = result

    def record(self) -> dict[str, Any]:
        """Return `leapt`; after a leap also its step, flow time t and the evaluations it saved."""
        record: dict[str, Any] = {"leapt": self._end is not None}
        if self._end is not None:
            record["after_steps"] = self._end.step.index
            record["t"] = round(self._end.t, 3)
            record["evaluations_saved"] = self._saved(self._end.step.index)
        if self.similarities:
            record["similarities"] = [_round(value) for value in self.similarities]
        return record

    def summary(self) -> str:
        steps = self._schedule.steps
        if self._end is None:
            return f"lpl: no leap in {steps} steps"
        index = self._end.step.index
        return (
            f"lpl: leapt to the end from t = {self._end.t:.0f}, after {index} of "
            f"{steps} steps; {self._saved(index)} evaluations saved"
        )

    def _saved(self, index: int) -> int:
        # The leap itself takes one evaluation.
        return (self._schedule.steps - index) * self._schedule.evaluations - 1


class FixedLeap(Leap):
    """Leap after a number of ordinary steps."""

    @property
    def earliest(self) -> int:
        return self._config.after

    def decide(self, step: Step, v: mx.array) -> bool:
        return step.index >= self.earliest and step.pending is None


class TimedLeap(Leap):
    """Leap in the first step that starts at a flow time or below (t falls from 1000)."""

    earliest = 0

    def decide(self, step: Step, v: mx.array) -> bool:
        return bool((step.t <= self._config.time).all().item()) and step.pending is None


class AdaptiveLeap(Leap):
    """Leap when the velocity has stopped becoming steadier; the text of the paper.

    The similarity of a step is the cosine between its guided velocity and the one before, over the
    whole tensor (frames that do not move are left out). It counts from the step that brings the
    share of velocities seen to `minimum`. Once it has failed `patience` times in a row to exceed
    its best by more than `tolerance`, the sample is ready, and stays so while others are not.
    """

    def __init__(self, config: Lpl, schedule: ScheduleInfo) -> None:
        super().__init__(config, schedule)
        self._plateaus: list[Plateau] = []
        self._ready: list[bool] = []
        self._previous: mx.array | None = None

    @property
    def earliest(self) -> int:
        config, steps = self._config, self._schedule.steps
        return max(1, math.ceil(config.minimum * steps) - 1) + config.patience

    def decide(self, step: Step, v: mx.array) -> bool:
        previous, self._previous = self._previous, v
        if previous is None:
            self._ready = [False] * len(v)
            self._plateaus = [self._plateau() for _ in self._ready]
            return False
        values = similarity(v, previous, step)
        self.similarities.append(values)
        if step.index + 1 < self._config.minimum * step.total:
            return False
        for sample, changing in enumerate(_changing(step, len(v))):
            if not changing and self._plateaus[sample].update(values[sample]):
                self._ready[sample] = True
        return all(self._ready)

    def state(self) -> State:
        return super().state() | {
            "similarities": list(self.similarities),
            "patience": [plateau.state() for plateau in self._plateaus],
            "ready": list(self._ready),
            "previous": self._previous,
        }

    def restore(self, state: State, /) -> None:
        super().restore(state)
        self.similarities, self._ready = list(state["similarities"]), list(state["ready"])
        self._previous = state["previous"]
        self._plateaus = [self._plateau() for _ in self._ready]
        for plateau, saved in zip(self._plateaus, state["patience"], strict=True):
            plateau.restore(saved)

    def _plateau(self) -> Plateau:
        return Plateau(self._config.patience, self._config.tolerance)


class ReferenceLeap(Leap):
    """Leap by the rule in the code of On-device Sora, for comparison with it.

    It looks at one frame of one channel of the first sample, row by row. MINIMUM is the index of
    the first step that counts. The best similarity starts at 0.
    """

    PATIENCE, TOLERANCE, MINIMUM = 3, 1e-3, 14

    def __init__(self, config: Lpl, schedule: ScheduleInfo) -> None:
        super().__init__(config, schedule)
        self.plateau = Plateau(self.PATIENCE, self.TOLERANCE, best=0.0)
        self._previous: mx.array | None = None

    @property
    def earliest(self) -> int:
        return max(1, self.MINIMUM) + self.PATIENCE - 1

    def decide(self, step: Step, v: mx.array) -> bool:
        rows = v[0, 0, :, :, 0]
        previous, self._previous = self._previous, rows
        if previous is None:
            return False
        dot, own, other = (
            (a * b).sum(axis=1) for a, b in ((rows, previous), (rows, rows), (previous, previous))
        )
        value = float(_cosine(dot, own, other).mean().item())  # type: ignore[arg-type]
        self.similarities.append(value)
        return step.index >= self.MINIMUM and self.plateau.update(value)

    def state(self) -> State:
        return {
            "similarities": list(self.similarities),
            "patience": self.plateau.state(),
            "previous": self._previous,
        }

    def restore(self, state: State, /) -> None:
        self.similarities, self._previous = list(state["similarities"]), state["previous"]
        self.plateau.restore(state["patience"])


class Plateau:
    """Detector of a value that does not exceed its best by `tolerance`, `patience` times in a row.

    left: further failures until then.
    """

    def __init__(self, patience: int, tolerance: float, best: float = -math.inf) -> None:
        self._patience, self._tolerance = patience, tolerance
        self.best, self.left = best, patience

    def update(self, value: float) -> bool:
        """Add the next value; return whether the plateau is reached."""
        if value > self.best + self._tolerance:
            self.best, self.left = value, self._patience
        else:
            self.left -= 1
        return self.left <= 0

    def state(self) -> State:
        # JSON has no infinity.
        return {"left": self.left} | ({"best": self.best} if math.isfinite(self.best) else {})

    def restore(self, state: State) -> None:
        self.left, self.best = state["left"], state.get("best", self.best)


def similarity(v: mx.array, previous: mx.array, step: Step) -> list[float]:
    """Return the cosine between two velocities [B, T, H, W, C] for each sample.

    previous: of the step before `step`. Only frames that move in both steps count.
    """
    pairs = ((v, previous), (v, v), (previous, previous))
    # Summed in stages: one long float32 sum would lose digits that the tolerance needs.
    products = [(a * b).sum(axis=(3, 4)).sum(axis=2) for a, b in pairs]
    moving = _moving(step)
    if moving is not None:
        products = [mx.where(moving, product, 0.0) for product in products]
    values: list[float] = _cosine(*(p.sum(axis=1) for p in products)).tolist()  # type: ignore[assignment]
    return values


def _moving(step: Step) -> mx.array | None:
    """Return which frames [B, T] move in this step and moved in the one before; None for all."""
    if step.x_mask is None or step.fresh is None:
        return step.x_mask
    return step.x_mask & ~step.fresh


def _changing(step: Step, samples: int) -> list[bool]:
    """Return for each sample whether its frames that move are not yet the same in all steps."""
    masks = [mask for mask in (step.fresh, step.pending) if mask is not None]
    if not masks:
        return [False] * samples
    found: list[bool] = mx.any(mx.stack(masks), axis=(0, 2)).tolist()  # type: ignore[assignment]
    return found


def _cosine(dot: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """Return the cosine from the products of two vectors with each other and with themselves."""
    return dot / (mx.maximum(mx.sqrt(a), TINY) * mx.maximum(mx.sqrt(b), TINY))


def _round(value: float | list[float]) -> float | list[float]:
    return [round(v, 6) for v in value] if isinstance(value, list) else round(value, 6)


RULES: dict[str | None, type[Leap]] = {
    "fixed": FixedLeap,
    "t": TimedLeap,
    "adaptive": AdaptiveLeap,
    "reference": ReferenceLeap,
}


def make_leap(config: Lpl, schedule: ScheduleInfo) -> Leap:
    """Return the leap of a run by the rule of the config."""
    return RULES[config.mode](config, schedule)
