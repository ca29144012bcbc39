"""Protocols of the denoising loop: velocity, sampler and leap policy.

Flow time t runs from 1000 (noise) to 0 (video). A step moves z by v · (t - t_next) / 1000.
Dimension letters: B batch, T frames, H W latent height and width, C channels, N steps.
Latents are float32 [B, T, H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx

#: Flow time of pure noise.
NOISE_TIME = 1000.0

#: State between two steps: arrays and plain JSON values, in dicts (with text keys) and lists.
State = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step of a run: number `index` of `total`, from flow time t [B] to t_next [B].

    Masks of frames [B, T]; None stands for all frames in x_mask, for no frame in the others.
    x_mask: frames that this step moves.
    fresh: frames that received their noise in this step. Earlier steps say nothing about them.
    pending: frames that this step does not move and a later step does.
    """

    index: int
    total: int
    t: mx.array
    t_next: mx.array
    x_mask: mx.array | None = None
    fresh: mx.array | None = None
    pending: mx.array | None = None

    @property
    def dt(self) -> mx.array:
        """Factor of the velocity in an Euler step, [B, 1, 1, 1, 1]."""
        return ((self.t - self.t_next) / NOISE_TIME).reshape(-1, 1, 1, 1, 1)

    def select(self, frames: slice) -> Step:
        """Return the step of some of the frames."""

        def masks(mask: mx.array | None, default: bool) -> mx.array | None:
            selected = None if mask is None else mask[:, frames]
            # A mask that says nothing costs work, and techniques wait for it.
            return None if selected is None or (selected == default).all().item() else selected

        return replace(
            self,
            x_mask=masks(self.x_mask, True),
            fresh=masks(self.fresh, False),
            pending=masks(self.pending, False),
        )


class Velocity(Protocol):
    """Velocity of the latents, guidance included."""

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        """Return v [B, T, H, W, C] at z and flow times t [B]; t may lie inside `step`."""


#: Velocity inside one step, as a function of z and t [B]. The loop fixes frames that do not move.
VelocityFn = Callable[[mx.array, mx.array], mx.array]


class Sampler(Protocol):
    """Solver of the flow: its times, and the step from one time to the next."""

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
        """Return flow times float32 [N + 1, B], evaluated, from at most 1000 down to exactly 0.

        height, width, num_frames: size of the video in pixels and frames; numbers (then B is 1),
        or arrays [B]. Raises UsageError for sizes without a schedule.
        """

    def step(
        self, velocity_fn: VelocityFn, z: mx.array, v: mx.array, step: Step, history: State, /
    ) -> mx.array:
        """Return z at step.t_next.

        v: velocity_fn(z, step.t). The method may evaluate velocity_fn at other times.
        history: what the method stores for the next step; empty before the first.
        """


class LeapPolicy(Protocol):
    """Decides when to end a run early. One object belongs to one run."""

    def should_leap(self, step: Step, z: mx.array, v: mx.array, /) -> bool:
        """Return whether to leap from z to t = 0 and end the run. v is velocity(z, step.t).

        The loop asks once per step, before it takes the step. z and v may be lazy.
        """

    def leap_velocity(self, step: Step, v: mx.array, /) -> mx.array:
        """Return the velocity to leap along, once the policy has decided to leap in this step."""

    def state(self) -> State:
        """Return the state after a step, in new containers."""

    def restore(self, state: State, /) -> None:
        """Set the state that an interrupted run had."""
