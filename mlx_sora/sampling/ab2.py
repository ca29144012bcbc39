"""Adams-Bashforth steps of order 2: extrapolate the velocity linearly from the last two.

Second order with one evaluation per step. The lengths h of steps may differ (the times of
rectified flow are uneven): the velocity of a step is v + (v - v_last) · h / (2 h_last).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.sampling.base import State, Step, VelocityFn
from mlx_sora.sampling.rflow import RFlow


@dataclass(frozen=True)
class AdamsBashforth(RFlow):
    """Sampler with the times of rectified flow and second-order steps.

    history: v, the velocity at the start of the last step, and dt, the length of that step.
    """

    def step(
        self, velocity_fn: VelocityFn, z: mx.array, v: mx.array, step: Step, history: State, /
    ) -> mx.array:
        """Return z after one step; an Euler step at first, and for frames with fresh noise."""
        if not history:
            history.update(v=v, dt=step.dt)
            return z + v * step.dt
        v_last: mx.array = history["v"]
        dt_last: mx.array = history["dt"]
        history.update(v=v, dt=step.dt)
        # A step of length 0 says nothing about the change of the velocity.
        weight = mx.where(dt_last == 0, 0, step.dt / mx.where(dt_last == 0, 1, 2 * dt_last))
        if step.fresh is not None:
            weight = mx.where(step.fresh[:, :, None, None, None], 0, weight)
        return z + (v + (v - v_last) * weight) * step.dt
