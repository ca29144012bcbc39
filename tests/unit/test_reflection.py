"""The trial of reflection: what a reflected step does, and how settings are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from benchmarks.reflection import Row, reflecting, show
from mlx_sora.sampling.guidance import Guidance
from mlx_sora.sampling.loop import denoise
from mlx_sora.sampling.rflow import RFlow
from tests.helpers.tolerance import rounding

SCALE, TIMES = 3.0, mx.array([[1000.0], [600.0], [0.0]])


class Linear:
    """A network whose velocity is a · z · t / 1000; a is 1 with the prompt, 0.5 without."""

    def prepare(self, text: Sequence[mx.array]) -> mx.array:
        return mx.stack([sample.mean() for sample in text]).reshape(-1, 1, 1, 1, 1)

    def __call__(self, z: mx.array, t: mx.array, conditions: mx.array, *_: Any) -> mx.array:
        return conditions * z * t.reshape(-1, 1, 1, 1, 1) / 1000


def end(count: int) -> float:
    """The latents at t = 0, from 1, with the first `count` steps reflected."""
    guidance = Guidance(Linear(), [mx.ones((1, 1))], lambda n: mx.full((n, 1), 0.5), SCALE)
    with reflecting(count):
        *_, last = denoise(guidance, mx.ones((1, 1, 1, 1, 1)), TIMES, RFlow())
    return float(last.z.item())  # type: ignore[arg-type]


def test_a_reflected_step_goes_back_without_guidance() -> None:
    guided = 0.5 + SCALE * (1 - 0.5)
    second = 1 + guided * 0.6 * 0.6
    assert abs(end(0) - (1 + guided * 0.4) * second) < rounding(1e-5)
    back = (1 + guided * 0.4) * (1 - 0.6 * 0.4)
    assert abs(end(1) - back * (1 + guided * 0.4) * second) < rounding(1e-5)
    assert Guidance.__call__.__qualname__ == "Guidance.__call__"  # the trial leaves nothing behind


def test_settings_are_compared_video_by_video() -> None:
    plain, reflected = (True, True, False, False), (True, False, True, True)
    table = show([Row(1, 0, 30, 0, plain), Row(1, 0, 24, 4, reflected)])
    assert "| 1 | 0 of 30 | 50.0% of 4 |  |" in table
    assert "| 1 | 4 of 24 | 75.0% of 4 | +2 -1 |" in table
