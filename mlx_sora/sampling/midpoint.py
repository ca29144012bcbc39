"""Midpoint steps on the rectified flow: second order with two evaluations per step.

RF-Solver (arXiv 2411.04746) corrects each step by the velocity's derivative, which it takes from a
second evaluation half a step on; written out, that is the explicit midpoint rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.sampling.base import Step, VelocityFn
from mlx_sora.sampling.rflow import RFlow


@dataclass(frozen=True)
class Midpoint(RFlow):
    """The times of rectified flow; each step goes along the velocity of its middle."""

    @property
    def evaluations(self) -> int:
        return 2

    def step(self, velocity_fn: VelocityFn, z: mx.array, v: mx.array, step: Step, /) -> mx.array:
        """z after one step: half of it to find the middle, all of it along the velocity there."""
        middle = (step.t + step.t_next) / 2
        return z + velocity_fn(z + v * (step.dt / 2), middle) * step.dt
