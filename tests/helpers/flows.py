"""Analytic flows: velocities whose outcome is known, to judge a sampler without a network.

With u = t / 1000 a velocity v means dz/du = -v.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_sora.sampling.base import Step

#: B, T, H, W, C of the small latents that the tests use.
SHAPE = (2, 3, 2, 2, 4)


def latents(seed: int = 0, shape: Sequence[int] = SHAPE) -> mx.array:
    """Normal latents."""
    return mx.random.normal(shape, key=mx.random.key(seed))


def times(steps: int) -> mx.array:
    """Uniform flow times [steps + 1, 1]."""
    return mx.linspace(1000.0, 0.0, steps + 1)[:, None]


@dataclass
class Straight:
    """Everything flows straight to `end`; counts its calls and keeps the frame masks."""

    end: mx.array
    masks: list[mx.array | None] = field(default_factory=list)

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        self.masks.append(step.x_mask)
        return (self.end - z) / (t / 1000.0).reshape(-1, 1, 1, 1, 1)


class Curved:
    """dz/du = -3u² z: from z at u = 1 to `end(z)` at u = 0, along a curve."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        self.calls += 1
        return z * (3.0 * (t / 1000.0) ** 2).reshape(-1, 1, 1, 1, 1)

    @staticmethod
    def end(z: mx.array) -> mx.array:
        return z * math.e
