"""Prompt syntax: what is read, and what is refused with a way out."""

from __future__ import annotations

import pytest

from mlx_sora.errors import UsageError
from mlx_sora.text.cleaning import preprocess
from mlx_sora.text.prompt import (
    Prompt,
    PromptDirectives,
    Scene,
    Scores,
    Segment,
    prepare_prompt,
    scene_at,
)


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
        ("[0-17] a [18-34] b", r"Frames \[18-34\] of the prompt do not follow"),
        ("[0-17] a [17-17] b", r"\[17-17\] of the prompt do not follow"),
        ("[0-17] [17-34] b", r"\[0-17\] of the prompt have no text"),
        ("|0|a|1|[0-9] b [9-17]", r"\[9-17\] of the prompt have no text"),
        ("".join(f"[{i}-{i + 1}] a" for i in range(101)), "101 ranges of frames"),
    ],
)
def test_unreadable_prompts(prompt: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        prepare_prompt(prompt)


def test_no_scene() -> None:
    with pytest.raises(UsageError, match="no scene for loop 0"):
        scene_at([Scene(3, "late")], 0)


def test_segments() -> None:
    prompt = prepare_prompt(' [0-17] A Cat [17-34]a dog {"mask_strategy": "0"}', Scores(motion=2))
    text = "[0-17] a cat motion score: 2.0. [17-34] a dog motion score: 2.0."
    assert prompt.text() == text
    assert prompt.segments == {
        text: (
            Segment(0, 17, "a cat motion score: 2.0.", "a cat"),
            Segment(17, 34, "a dog motion score: 2.0.", "a dog"),
        )
    }
    assert prompt.directives.mask_strategy == "0"
    scenes = prepare_prompt("|0|[0-5] a [5-9] b|1|c")
    assert [[part.subject for part in parts] for parts in scenes.parts()] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    "text",
    [
        "a [0-17] cat [17-34] dog",
        "[1980-1990] a street",
        "[17-34] a cat",
        "[red] a cat",
        "[0-a] a cat",
        "[0-9999999] a cat",
        "[0 - 17] a cat",
        "(0-17) a cat",
    ],
)
def test_brackets_elsewhere_are_text(text: str) -> None:
    prompt = prepare_prompt(text)
    assert prompt.segments == {}
    assert prompt.text() == preprocess(text)
