"""What the denoising loop works with: protocols of velocity, sampler and step policy.

Flow time t runs from 1000 (noise) to 0 (video); z moves by v · (t - t_next) / 1000 in a step.
A sampler or a policy holds settings only; `start` gives the object that holds the state of one run.
Dimension letters: B batch, T frames, H W latent height and width, C channels, N steps.
Latents are float32 [B, T, H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx

#: Flow time of pure noise.
NOISE_TIME = 1000.0

#: What is known after a step: arrays and plain JSON values, in dicts (by text) and lists.
State = dict[str, Any]


@runtime_checkable
class Resumable(Protocol):
    """A part of a run with a memory: what it knows can be put away, and given to another like it.

    Parts without one need not be Resumable.
    """

    def state(self) -> State:
        """What it knows between two steps, in containers of its own."""

    def restore(self, state: State, /) -> None:
        """Know what `state` says, as if the steps before had been made here."""


def state_of(part: object) -> State:
    """The state of a part; nothing for one without memory."""
    return part.state() if isinstance(part, Resumable) else {}


def restore(part: object, state: State) -> None:
    """Give a part its state back."""
    if isinstance(part, Resumable):
        part.restore(state)


@dataclass(frozen=True)
class Trajectory:
    """What a run is about. times [N + 1, B]: flow times, each step's end is the next one's start.

    mask [B, T] of the frames, as in `loop.Conditioning`, or None.
    """

    times: mx.array
    mask: mx.array | None = None

    @property
    def steps(self) -> int:
        return int(self.times.shape[0]) - 1


@dataclass(frozen=True)
class Step:
    """One step of a run, `index` from 0 of `total`, from flow time t [B] to t_next [B].

    x_mask [B, T]: true for frames that move in this step; None when all do.
    fresh [B, T]: true for frames that noise was put into just now, so that nothing known about
    them from earlier steps holds; None when there are none.
    """

    index: int
    total: int
    t: mx.array
    t_next: mx.array
    x_mask: mx.array | None = None
    fresh: mx.array | None = None

    @property
    def dt(self) -> mx.array:
        """How far z moves per velocity, [B, 1, 1, 1, 1]."""
        return ((self.t - self.t_next) / NOISE_TIME).reshape(-1, 1, 1, 1, 1)


class Velocity(Protocol):
    """Velocity of a run's latents, guidance included."""

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        """v [B, T, H, W, C] at z and flow times t [B], inside `step` (t may lie within it)."""


#: A velocity inside one step: z and t [B] to v. Frames that do not move are held by the loop.
VelocityFn = Callable[[mx.array, mx.array], mx.array]


class Stepper(Protocol):
    """A sampler at work in one run; keeps the history its method needs."""

    def step(self, velocity_fn: VelocityFn, z: mx.array, v: mx.array, step: Step, /) -> mx.array:
        """z at step.t_next. v is field(z, step.t); further evaluations are the method's own."""


class Sampler(Protocol):
    """A way to follow the flow: where to stop on it, and how to get from stop to stop."""

    @property
    def evaluations(self) -> int:
        """Evaluations of the velocity per step."""

    def timesteps(
        self,
        steps: int,
        *,
        height: float | mx.array,
        width: float | mx.array,
        num_frames: float | mx.array,
    ) -> mx.array:
        """Flow times float32 [N + 1, B], falling, from at most 1000 to exactly 0, evaluated.

        Sizes in pixels and frames of the video asked for: numbers (then B is 1), or arrays [B].
        Raises UsageError where no schedule exists.
        """

    def start(self, run: Trajectory, /) -> Stepper:
        """State for one run."""


class Decision(Protocol):
    """A step policy at work in one run."""

    def should_leap(self, step: Step, z: mx.array, v: mx.array, /) -> bool:
        """Whether to go from z straight to t = 0 along v = velocity(z, step.t), and end the run.

        Asked once per step, before it is made. z and v may still be lazy.
        """


class StepPolicy(Protocol):
    """Says when the rest of the steps is not worth making."""

    def start(self, run: Trajectory, /) -> Decision:
        """State for one run."""


class AllSteps:
    """Every step is made."""

    def start(self, run: Trajectory, /) -> AllSteps:
        return self

    def should_leap(self, step: Step, z: mx.array, v: mx.array, /) -> bool:
        return False
