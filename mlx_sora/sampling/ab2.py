"""Adams-Bashforth steps of order 2: the line through the last two velocities, carried one step on.

Second order with one evaluation per step, for steps of any lengths (the times of rectified flow
are uneven): v + (v - v_before) · h / (2 h_before), h being the length of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.sampling.base import State, Step, Stepper, Trajectory, VelocityFn
from mlx_sora.sampling.rflow import RFlow


@dataclass(frozen=True)
class AdamsBashforth(RFlow):
    """The times of rectified flow; each step also uses the velocity of the one before."""

    def start(self, run: Trajectory, /) -> Stepper:
        """State for one run."""
        return _TwoSteps()


class _TwoSteps:
    """Remembers the velocity that the last step began with, and how long it was."""

    def __init__(self) -> None:
        self._last: tuple[mx.array, mx.array] | None = None

    def state(self) -> State:
        if self._last is None:
            return {}
        return dict(zip(("v", "dt"), self._last, strict=True))

    def restore(self, state: State, /) -> None:
        self._last = (state["v"], state["dt"]) if state else None

    def step(self, velocity_fn: VelocityFn, z: mx.array, v: mx.array, step: Step, /) -> mx.array:
        """z after one step; an Euler step at first, and for frames that only now begin to move."""
        last, self._last = self._last, (v, step.dt)
        if last is None:
            return z + v * step.dt
        before, length = last
        # A step of no length says nothing about where the velocity is going.
        share = mx.where(length == 0, 0, step.dt / mx.where(length == 0, 1, 2 * length))
        if step.fresh is not None:
            share = mx.where(step.fresh[:, :, None, None, None], 0, share)
        return z + (v + (v - before) * share) * step.dt
