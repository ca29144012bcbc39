"""`edit` from the command line, on the bundled model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_sora.cli.main import main
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.writer import save_frames

PROMPTS = ("--source-prompt", "a red circle", "--prompt", "a blue circle")
SMALL = (*PROMPTS, "--model", "shapes", "--steps", "1", "--width", "32", "--height", "32")


@pytest.fixture
def clip(folder: Path) -> str:
    frames = np.full((17, 32, 32, 3), 90, np.uint8)
    return str(save_frames(folder / "clip{1}.mp4", frames, 24, None, False))


def test_edit_prints_the_path_and_records_the_request(
    clip: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["edit", clip, *SMALL, "--inject-steps", "0", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == "clip{1}-edited.mp4"
    record = read_metadata(folder / "clip{1}-edited.mp4")
    assert record["edit"]["source_prompt"] == "a red circle"
    assert record["edit"]["inject_steps"] == 0
    assert record["settings"]["sampler"] == "midpoint"
    assert main(["edit", clip, *SMALL]) == 2, "what is there is not overwritten"


def test_dry_run_writes_no_file(
    clip: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["edit", clip, *SMALL, "--dry-run"]) == 0
    assert "denoise" in capsys.readouterr().out
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "b"], "source prompt is empty"),
        (["--source-prompt", "a"], "the prompt is empty"),
        ([*PROMPTS, "--seed", "3"], "--seed"),
        ([*PROMPTS, "--inject-steps", "x"], "--inject-steps"),
        ([*PROMPTS, "--inject-steps", "40", "--model", "shapes"], "Give 0 to 30"),
    ],
)
def test_usage_errors_are_one_line(
    clip: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["edit", clip, *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert error.startswith("error: ")
    assert "\n" not in error
