"""The drawn world: what a video shows that is longer than its motion."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.shapes import world
from mlx_sora.loading.model_folder import ModelFolder, bundled_folder


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


def test_the_card_of_the_bundled_model_describes_the_world() -> None:
    card = ModelFolder.open(bundled_folder()).card()
    captions = {world.caption(attributes) for attributes in world.all_attributes()}
    assert set(card.prompts) <= captions
    words = (*world.COLOURS, *world.SHAPES, *world.MOTIONS, *world.BACKGROUNDS)
    assert [word for word in words if word not in card.description] == []
    assert card.sizes == ("64x64",)
