"""Texts that tell the model nothing make a video and a warning (lmstudio-ai/mlx-engine #162)."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_sora.pipeline import Pipeline

EMPTY, UNKNOWN = "https://example.com", "\uc548\ub155"
NOTHING, NO_CHARACTER = "Nothing is left of {}", "knows no character of {}"


@pytest.mark.parametrize("aesthetic", [None, 6.5])
@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"prompt": EMPTY}, NOTHING.format("the prompt")),
        ({"prompt": UNKNOWN}, NO_CHARACTER.format("the prompt")),
        ({"negative_prompt": EMPTY}, NOTHING.format("the negative prompt")),
        ({"negative_prompt": ""}, NOTHING.format("the negative prompt")),
        ({"negative_prompt": UNKNOWN}, NO_CHARACTER.format("the negative prompt")),
        ({"prompt": f"|0|red|1|{EMPTY}"}, NOTHING.format("scene 2 of the prompt")),
        ({"prompt": f"|0|red|1|{UNKNOWN}"}, NO_CHARACTER.format("scene 2 of the prompt")),
        ({"prompt": "|0||1|red"}, NOTHING.format("scene 1 of the prompt")),
        ({"prompt": UNKNOWN, "negative_prompt": UNKNOWN}, NO_CHARACTER.format("the prompt")),
    ],
)
def test_a_warning_is_all(
    pipe: Pipeline, options: dict[str, Any], warning: str, aesthetic: float | None
) -> None:
    small = {"steps": 1, "num_frames": 34, "width": 64, "height": 64, "seed": 1}
    made = pipe(**{"prompt": "red", "loop": 2, "aesthetic": aesthetic, **small, **options})
    assert any(warning in line for line in made.warnings)
    assert made.metadata["warnings"] == list(made.warnings)


@pytest.mark.parametrize("prompt", ["red", "red \uc548\ub155", "|0|red|5|https://example.com"])
def test_other_texts_warn_of_nothing(pipe: Pipeline, prompt: str) -> None:
    made = pipe(prompt, steps=1, num_frames=1, width=64, height=64, negative_prompt="blue")
    assert not [line for line in made.warnings if "left of" in line or "character" in line]
