"""The drawn world: what a video shows that is longer than its motion."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.shapes import world
from mlx_sora.loading.model_folder import ModelFolder, bundled_folder
from mlx_sora.text.cleaning import preprocess


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
    index = json.loads((bundled_folder() / "model_index.json").read_text())
    assert index["card"] == world.model_card()


def test_every_caption_of_training_fits_the_card() -> None:
    card = ModelFolder.open(bundled_folder()).card
    wordings = [
        world.fill(pattern, attributes, doing, does)
        for attributes in world.all_attributes()
        for pattern in world.PATTERNS
        for doing, does in zip(
            world.PARTICIPLES[attributes.motion], world.VERBS[attributes.motion], strict=True
        )
    ]
    rng = np.random.default_rng(0)
    captions = [world.random_caption(each, rng) for each in world.all_attributes()]
    texts = {*wordings, *captions, *map(preprocess, captions[::9]), *card.prompts}
    assert [text for text in texts if not card.fits(text)] == []
    assert {*world.COLOURS, *world.BACKGROUNDS} <= set(" ".join(texts).split())


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a cat on a beach", ["cat", "beach"]),
        ("A pink circle moving left on a black background", ["pink"]),
        ("two red circles moving left on a black background", ["two", "circles"]),
        ("a red circle", []),
        ("a red circle a blue square moving left on a black background", []),
        ("a black circle moving left on a white background", []),
        ("a white circle moving left on a white background", []),
        ("a red circle moving left on a black background " * 30, []),
    ],
)
def test_other_prompts_do_not_fit(prompt: str, unknown: list[str]) -> None:
    card = ModelFolder.open(bundled_folder()).card
    assert card.unknown_words(prompt) == unknown
    assert not card.fits(prompt)
