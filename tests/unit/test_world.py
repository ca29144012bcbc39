"""The drawn world: what a video shows that is longer than its motion."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.shapes import world


@pytest.mark.parametrize("frames", [17, 34, 51])
def test_a_motion_swings_back_and_forth(frames: int) -> None:
    there = np.linspace(0, 1, frames)
    times = world.swing(frames, 0, 3 * frames)
    assert np.allclose(times, np.concatenate([there, there[::-1], there]), atol=1e-12)
    assert np.abs(np.diff(times)).max() <= 1.0001 / (frames - 1)


def test_a_window_is_a_part_of_the_whole() -> None:
    whole = world.swing(34, 0, 200)
    for first in (17, 51, 85):
        assert np.array_equal(world.swing(34, first, 34), whole[first : first + 34])
