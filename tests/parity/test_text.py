"""Caption cleaning, prompt syntax and conditioning text against the reference: exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size, model_arguments
from mlx_sora.text import cleaning, conditioning, prompt
from mlx_sora.text.prompt import Scene, Scores
from tests.parity.golden import Case


def agrees(row: dict[str, Any], function: Callable[..., Any], *args: Any) -> None:
    """`function(*args)` is the row's `out`, or refuses where the reference raised."""
    if "error" in row:
        with pytest.raises(UsageError):
            function(*args)
    else:
        assert function(*args) == row["out"], row


@pytest.mark.golden("text_clean")
def test_cleaning(case: Case) -> None:
    for row in case.config["rows"]:
        assert cleaning.clean(row["in"]) == row["once"], row["in"]
        assert cleaning.preprocess(row["in"]) == row["twice"], row["in"]


def scores(row: dict[str, Any]) -> Scores:
    return Scores(row["aes"], row["flow"], row["camera_motion"])


@pytest.mark.golden("text_score")
def test_scores(case: Case) -> None:
    for row in case.config["rows"]:
        assert [scores(row).append_to(text) for text in row["prompts"]] == row["out"], row


def split(text: str) -> list[Any]:
    """Scenes as the reference returns them: stripped texts, and their starts when marked."""
    scenes = prompt.split_scenes(text)
    if not text.startswith("|0|"):
        return [[scene.text for scene in scenes], None]
    return [[scene.text.strip() for scene in scenes], [scene.start for scene in scenes]]


def scene_of(text: str, loop: int) -> list[str]:
    return [prompt.scene_at(prompt.split_scenes(text), loop)]


@pytest.mark.golden("text_split")
def test_scenes(case: Case) -> None:
    for row in case.config["rows"]:
        text = row["prompt"]
        agrees(row["split"], split, text)
        for loop, expected in enumerate(row["loops_raw"]):
            agrees(expected, scene_of, text, loop)
        if "merged" in row:
            texts, starts = split(text)
            pairs = zip(starts or [0], texts, strict=True)
            merged = prompt.join_scenes([Scene(*pair) for pair in pairs]) if starts else texts[0]
            assert merged == row["merged"]["out"]
            for loop, expected in enumerate(row["loops"]):
                agrees(expected, scene_of, merged, loop)


@pytest.mark.golden("text_json_prompt")
def test_settings_in_the_prompt(case: Case) -> None:
    def read(text: str) -> list[list[str]]:
        rest, found = prompt.split_settings(text)
        reference = "REF" if found.reference_path is None else found.reference_path
        strategy = "MS" if found.mask_strategy is None else found.mask_strategy
        return [[rest], [reference], [strategy]]

    for row in case.config["rows"]:
        agrees(row, read, row["prompt"])


@pytest.mark.golden("text_pipeline")
def test_whole_prompt(case: Case) -> None:
    for row in case.config["rows"]:
        ready = prompt.prepare_prompt(row["prompt"], scores(row))
        assert (ready.settings.reference_path or "") == row["reference"]
        assert (ready.settings.mask_strategy or "") == row["mask_strategy"]
        assert [scene.text for scene in ready.scenes] == row["cleaned"]
        marked = row["merged"].startswith("|0|")
        assert (prompt.join_scenes(ready.scenes) if marked else ready.text()) == row["merged"]
        assert [ready.text(loop) for loop in range(len(row["loops"]))] == row["loops"]
        text, _ = prompt.split_settings(row["prompt"])
        texts, _ = split(text)
        assert [scores(row).append_to(part) for part in texts] == row["scored"]


@pytest.mark.golden("text_save_name")
def test_file_names(case: Case) -> None:
    for row in case.config["rows"]:
        kwargs = row["kwargs"]
        name = prompt.sample_name(
            kwargs.get("sample_idx"),
            prefix=kwargs.get("sample_name"),
            prompt=kwargs["prompt"] if kwargs.get("prompt_as_path") else None,
            sample=kwargs["k"] if kwargs.get("num_sample", 1) != 1 else None,
        )
        assert f"dir/{name}" == row["out"], row


@pytest.mark.golden("text_model_args")
def test_model_arguments(case: Case) -> None:
    def expected(row: dict[str, Any]) -> dict[str, Any]:
        height, width = row["image_size"]
        made = model_arguments(Size(width, height), row["num_frames"], row["fps"])
        # The transformer of this version does not look at the aspect ratio.
        told = {**made.sizes, "ar": made.height / made.width, "fps": made.fps}
        told = {name: float(np.float32(value)) for name, value in told.items()}
        if row["info_type"] is None:
            return {}
        if row["info_type"] == "PixArtMS":
            sample = {"ar": [told["ar"]], "hw": [told["height"], told["width"]]}
            return {name: [value] * row["batch_size"] for name, value in sample.items()}
        return {name: [value] * row["batch_size"] for name, value in told.items()}

    for row in case.config["rows"]:
        assert expected(row) == row["out"], row


@pytest.mark.golden("text_mask_strategy")
def test_mask_strategy_text(case: Case) -> None:
    def parse(text: str | None) -> list[list[float]]:
        return [list(vars(p).values()) for p in conditioning.parse_mask_strategy(text)]

    for row in case.config["parse"]:
        agrees(row, parse, row["in"])
    for row in case.config["find_nearest_point"]:
        found = conditioning.align(row["value"], row["point"], row["max_value"])
        assert found == row["out"], row
    for row in case.config["dframe_to_frame"]:
        agrees(row, conditioning.frames_of_latents, row["in"])


def extended(row: dict[str, Any], loops: list[int]) -> tuple[list[str | None], list[int]]:
    """Strategies and reference counts of a batch after the clips of `loops` were appended."""
    strategies, counts = list(row["mask_strategy_in"]), list(row["refs_len_in"])
    length, edit = row["condition_frame_length"], row["condition_frame_edit"]
    for loop in loops:
        for i, count in enumerate(counts):
            placement = conditioning.continuation(loop, count, length, edit)
            strategies[i] = conditioning.append_generated(strategies[i], placement)
            counts[i] += 1
    return strategies, counts


@pytest.mark.golden("text_append_generated")
def test_appended_clips(case: Case) -> None:
    rows = [(row, [row["loop_i"]]) for row in case.config["single"]]
    rows += [(row, row["loops"]) for row in case.config["chained"]]
    for row, loops in rows:
        if "error" in row:
            # The reference crashes without a reference list (None); the count is a number here.
            assert None in row["refs_len_in"]
            continue
        strategies, counts = extended(row, loops)
        assert strategies == row["mask_strategy_out"]
        assert counts == row["refs_len_out"]
