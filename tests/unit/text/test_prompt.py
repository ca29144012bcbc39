"""Prompt syntax: what is read, and what is refused with a way out."""

from __future__ import annotations

import pytest

from mlx_sora.errors import UsageError
from mlx_sora.text.prompt import Prompt, PromptDirectives, Scene, Scores, prepare_prompt, scene_at


def test_plain_prompt() -> None:
    assert prepare_prompt("A Cat") == Prompt((Scene(0, "a cat"),), ("a cat",))
    assert prepare_prompt("").text() == ""


def test_scores_survive_cleaning_and_are_not_doubled() -> None:
    scores = Scores(aesthetic=6.5, motion=4, camera="pan left")
    text = prepare_prompt("a cat. motion score: 1.0.", scores).text()
    assert text == "a cat. motion score: 1.0. aesthetic score: 6.5. camera motion: pan left."


def test_scenes_and_settings() -> None:
    prompt = prepare_prompt('|0| Snow |2| Spring {"reference_path": "a.png"}', Scores(motion=2))
    assert prompt.directives == PromptDirectives(reference_path="a.png")
    assert [scene.start for scene in prompt.scenes] == [0, 2]
    assert [prompt.text(loop)[:5] for loop in range(4)] == ["snow ", "snow ", "sprin", "sprin"]
    assert all(scene.text.endswith("motion score: 2.0.") for scene in prompt.scenes)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a {cat}", "not JSON"),
        ('x{"seed": "1"}', "reference_path or mask_strategy"),
        ('x{"mask_strategy": 3}', "must be a string"),
        ('x{"mask_strategy": "0"}{}', "More than one"),
        ("|0|a|b|c", "whole number"),
        ("|0|a|1", "whole number"),
    ],
)
def test_unreadable_prompts(prompt: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        prepare_prompt(prompt)


def test_no_scene() -> None:
    with pytest.raises(UsageError, match="no scene for loop 0"):
        scene_at([Scene(3, "late")], 0)
