"""One warning for all that a model was not trained for, before the run, with the way out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_sora.cli.main import main
from mlx_sora.loading.model_folder import BUNDLED, PUBLISHED, WEIGHTS_VARIABLE, bundled_folder
from mlx_sora.pipeline import Pipeline
from mlx_sora.server.planning import plan_task
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.writer import save_frames
from tests.unit.loading.test_model_folder import make_model

KNOWN = "a red circle moving right on a black background"
CAT = "a cat on a beach"
PATTERN = '"a COLOUR SHAPE MOTION on a BACKGROUND background"'


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def warnings(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Return the warnings of a planned run with the bundled model."""
    assert main([*words, "--model", "shapes", "--dry-run"]) == 0
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["-p", CAT], "the prompt (cat, beach)"),
        (["-p", "one two three four five six"], "the prompt (one, two, three, four, five, ...)"),
        (["-p", "a red circle"], "the prompt"),
        (["-p", KNOWN, "--width", "128", "--height", "64"], "128x64 pixels"),
        (["-p", KNOWN, "--num-frames", "20"], "20 frames"),
        (["-p", KNOWN, "--camera", "pan left"], "the prompt (camera, motion, pan)"),
        (["-p", KNOWN, "--negative-prompt", "ugly"], "the negative prompt (ugly)"),
        (
            ["-p", f"|0|{KNOWN}|1|{CAT}|2|a dog", "--loop", "2", "--num-frames", "34"],
            "scene 2 of the prompt (cat, beach)",
        ),
        (
            ["-p", CAT, "--negative-prompt", "ugly", "--resolution", "144p", "--num-frames", "85"],
            "the prompt (cat, beach), the negative prompt (ugly), 256x144 pixels and 85 frames",
        ),
    ],
)
def test_one_line_names_all_and_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], words: list[str], names: str
) -> None:
    found = [line for line in warnings(capsys, "generate", *words) if "trained" in line]
    assert found == [
        f"shapes was not trained for {names}; it draws {PATTERN}, at 64x64 pixels, of 1, 17, 34, "
        "51 or 68 frames. Its words: python -m mlx_sora info --model shapes. For anything else: "
        "python -m mlx_sora download opensora-1.2"
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["-p", KNOWN],
        ["-p", KNOWN, "--aesthetic", "6.5", "--motion", "5", "--num-frames", "51"],
        ["-p", f"{KNOWN}. Aesthetic score: 5.1. motion score: 3.", "--num-frames", "1"],
        ["-p", f"|0|{KNOWN}|1|A blue square grows over white", "--loop", "2", "--frames", "34"],
        ["-p", KNOWN, "--negative-prompt", "red, moving"],
    ],
)
def test_what_it_was_trained_for_warns_of_nothing(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert warnings(capsys, "generate", *words) == []


def test_each_line_of_a_prompt_file_is_checked(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "prompts.txt").write_text(f"{CAT}\n{KNOWN}\na dog\n")
    found = warnings(capsys, "generate", "--prompt-file", "prompts.txt")
    assert [line.partition(";")[0].partition(" for ")[2] for line in found] == [
        "the prompt (cat, beach)",
        "the prompt (dog)",
    ]


def test_both_prompts_of_an_edit_are_checked(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = str(
        save_frames(work / "a.mp4", np.full((17, 64, 64, 3), 90, np.uint8), 24, None, False)
    )
    for source, prompt, names in (
        (KNOWN, CAT, "the prompt (cat, beach)"),
        (CAT, KNOWN, "the source prompt (cat, beach)"),
        (CAT, "a dog", "the prompt (dog) and the source prompt (cat, beach)"),
    ):
        (found,) = warnings(capsys, "edit", video, "--source-prompt", source, "--prompt", prompt)
        assert found.startswith(f"shapes was not trained for {names}; it draws")


def test_quiet_hides_it_and_the_record_has_it(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "-p", CAT, "--model", "shapes", "--steps", "1", "--num-frames", "1"]
    assert main([*words, "--quiet", "-o", "a.png"]) == 0
    assert capsys.readouterr() == ("a.png\n", "")
    (recorded,) = read_metadata(work / "a.png")["warnings"]
    assert main([*words, "--dry-run", "--json-events"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["warnings"] == [recorded]


def test_the_plan_of_the_server_shows_it(pipe: Pipeline, work: Path) -> None:
    plan = plan_task(pipe, "generate", {"prompt": CAT}, {}, str(work / "a"))
    assert [line for line in plan.warnings if "was not trained for the prompt (cat" in line]


def test_the_model_that_can_is_named_if_it_is_there(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(work / "models" / PUBLISHED)
    (work / "models" / BUNDLED).symlink_to(bundled_folder())
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(work / "models"))
    (found,) = warnings(capsys, "generate", "-p", CAT)
    assert found.endswith("For anything else: --model opensora-1.2")


def test_info_shows_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "shapes"]) == 0
    shown = capsys.readouterr().out
    assert "COLOUR: red; green; blue;" in shown
    assert "sizes: 64x64\n" in shown
    assert "num frames: 1; 17; 34; 51; 68\n" in shown
