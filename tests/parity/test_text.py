"""Caption cleaning, prompt syntax and conditioning text against the reference: exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from mlx_sora.conditioning import mask_strategy as conditioning
from mlx_sora.conditioning.clips import Clips
from mlx_sora.errors import UsageError
from mlx_sora.geometry import MAX_FRAMES, MICRO_FRAME_SIZE, Size, model_arguments
from mlx_sora.text import cleaning, prompt
from mlx_sora.text.prompt import Scene, Scores
from mlx_sora.video.output_template import fill_template
from tests.helpers.golden import Case


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


def merged(scenes: Sequence[Scene]) -> str:
    """Scenes in the one text that the reference puts them back into."""
    return "".join(f"|{scene.start}|{scene.text}" for scene in scenes)


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
            whole = merged([Scene(*pair) for pair in pairs]) if starts else texts[0]
            assert whole == row["merged"]["out"]
            for loop, expected in enumerate(row["loops"]):
                agrees(expected, scene_of, whole, loop)


@pytest.mark.golden("text_json_prompt")
def test_settings_in_the_prompt(case: Case) -> None:
    def read(text: str) -> list[list[str]]:
        rest, found = prompt.split_directives(text)
        reference = "REF" if found.reference_path is None else found.reference_path
        strategy = "MS" if found.mask_strategy is None else found.mask_strategy
        return [[rest], [reference], [strategy]]

    for row in case.config["rows"]:
        agrees(row, read, row["prompt"])


@pytest.mark.golden("text_pipeline")
def test_whole_prompt(case: Case) -> None:
    for row in case.config["rows"]:
        ready = prompt.prepare_prompt(row["prompt"], scores(row))
        assert (ready.directives.reference_path or "") == row["reference"]
        assert (ready.directives.mask_strategy or "") == row["mask_strategy"]
        assert [scene.text for scene in ready.scenes] == row["cleaned"]
        marked = row["merged"].startswith("|0|")
        assert (merged(ready.scenes) if marked else ready.text()) == row["merged"]
        assert [ready.text(loop) for loop in range(len(row["loops"]))] == row["loops"]
        text, _ = prompt.split_directives(row["prompt"])
        texts, _ = split(text)
        assert [scores(row).append_to(part) for part in texts] == row["scored"]


@pytest.mark.golden("text_save_name")
def test_file_names(case: Case) -> None:
    """The names that the scripts of the reference give, as templates of --output."""
    for row in case.config["rows"]:
        kwargs = row["kwargs"]
        prefix = kwargs.get("sample_name")
        if kwargs.get("prompt_as_path"):
            words = (prefix or "") + kwargs["prompt"]
            template = words.replace("{", "{{").replace("}", "}}")
        else:
            template = f"{prefix or 'sample'}_{{index:04d}}"
        if kwargs.get("num_sample", 1) != 1:
            template += f"-{kwargs['k']}"
        index = kwargs.get("sample_idx") or 0
        name = fill_template(f"dir/{template}", prompt="", seed=0, index=index)
        assert name == row["out"], row


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
        found = conditioning.find_nearest_point(row["value"], row["point"], row["max_value"])
        assert found == row["out"], row


@pytest.mark.golden("text_mask_strategy")
def test_latents_of_whole_chunks(case: Case) -> None:
    """What clips share is told in latent frames there, and in frames of whole chunks here."""

    def latents(frames: int) -> int:
        return Clips(MAX_FRAMES, count=2, shared_frames=frames).shared_latents

    reached = set(map(latents, range(0, MAX_FRAMES, MICRO_FRAME_SIZE)))
    for row in case.config["dframe_to_frame"]:
        if "error" in row:
            assert row["in"] not in reached, row
        else:
            assert latents(row["out"]) == row["in"], row


def extended(row: dict[str, Any], loops: list[int]) -> list[str]:
    """Strategies of a batch after the clips of `loops` were appended."""
    length, edit = row["condition_frame_length"], row["condition_frame_edit"]
    strategies = []
    for strategy, count in zip(row["mask_strategy_in"], row["refs_len_in"], strict=True):
        placements = conditioning.append_generated(loops, count, length, edit)
        written = ";".join(map(str, placements))
        assert conditioning.parse_mask_strategy(written) == placements
        strategies.append(f"{strategy};{written}" if strategy else written)
    return strategies


@pytest.mark.golden("text_append_generated")
def test_appended_clips(case: Case) -> None:
    rows = [(row, [row["loop_i"]]) for row in case.config["single"]]
    rows += [(row, row["loops"]) for row in case.config["chained"]]
    for row, loops in rows:
        if "error" in row:
            # The reference crashes without a reference list (None); the count is a number here.
            assert None in row["refs_len_in"]
            continue
        assert extended(row, loops) == row["mask_strategy_out"]
        assert [count + len(loops) for count in row["refs_len_in"]] == row["refs_len_out"]
