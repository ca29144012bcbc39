"""Midpoint steps on the rectified flow: second order with two evaluations per step.

RF-Solver (arXiv 2411.04746) corrects each step by the velocity's derivative, which it takes from a
second evaluation half a step on; written out, that is the explicit midpoint rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.sampling.base import State, Step, VelocityFn
from mlx_sora.sampling.rflow import RFlow


@dataclass(frozen=True)
class Midpoint(RFlow):
    """Sampler with the times of rectified flow and second-order steps."""

    @property
    def evaluations(self) -> int:
        return 2

    def step(
        self, velocity_fn: VelocityFn, z: mx.array, v: mx.array, step: Step, history: State, /
    ) -> mx.array:
        """Return z after one step along the velocity at its midpoint."""
        t_mid = (step.t + step.t_next) / 2
        return z + velocity_fn(z + v * (step.dt / 2), t_mid) * step.dt
