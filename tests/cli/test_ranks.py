"""The command line on two ranks: rank 0 alone prints and writes."""

from __future__ import annotations

import signal
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from mlx_sora.cli.flags import parse_args
from mlx_sora.cli.main import build_parser
from mlx_sora.cli.ranks import check_same_options
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.writer import save_frames
from tests.helpers.ranks import Launched, launch

GENERATE = ("-m", "mlx_sora", "generate", "--steps", "1", "--width", "32", "--height", "32")


def test_ranks_make_one_video(tmp_path: Path) -> None:
    words = [*GENERATE, "-p", "a red circle", "-o", "a.png", "--num-frames", "1"]
    made = launch(2, words, cwd=tmp_path)
    assert made.stdout.split() == ["a.png"], made.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert made.stderr.count("peak process") == 1
    assert read_metadata(tmp_path / "a.png")["parallel"] == {"ranks": 2, "mode": "guidance"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the videos of a prompt file."""
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(scope="module")
def result(folder: Path) -> Launched:
    """Run four prompts on two ranks; a file stands in the place of the second one's folder."""
    texts = ('"a.png"', '"prompts.jsonl/a.png"', '"b_%02d.png", "num_frames": 17', '"c.png"')
    prompts = (f'{{"prompt": "a circle", "seed": 1, "output": {text}}}' for text in texts)
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    words = ("--prompt-file", "prompts.jsonl", "--num-frames", "1", "--metadata")
    return launch(2, [*GENERATE, *words], cwd=folder)


def test_ranks_make_prompts_side_by_side(result: Launched, folder: Path) -> None:
    assert result.stdout.split() == ["a.png", "b_%02d.png", "c.png"]
    files = {file.name for file in folder.iterdir()} - {"prompts.jsonl"}
    frames = {f"b_{i:02d}.png" for i in range(17)}
    assert files == {"a.png", "a.json", "b.json", "c.png", "c.json", *frames}
    for name in ("a.png", "b_00.png", "c.png"):
        assert read_metadata(folder / name)["parallel"] == {"ranks": 2, "mode": "prompts"}


def test_a_failed_prompt_is_reported_once(result: Launched) -> None:
    (error,) = result.errors
    assert error.startswith("error: line 2: prompts.jsonl is not a folder.")
    assert 2 in result.codes


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([*GENERATE, "-p", "a", "-o", "a.png"], "a.png exists already. Give --overwrite or"),
        ([*GENERATE, "-p", "-"], "--prompt - does not work with mlx.launch, which never ends"),
        ([*GENERATE, "-p", "a", "--parallel", "off"], "--parallel off is for a single process"),
        (["-m", "mlx_sora", "info"], "info runs in one process, not in several. Start it without"),
        ([*GENERATE, "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_usage_error_is_reported_once(words: list[str], line: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    made = launch(2, words, cwd=tmp_path)
    (error,) = made.errors
    assert error.startswith(f"error: {line}")
    # mlx.launch ends the others as soon as one has ended.
    assert set(made.codes) <= {2, -signal.SIGTERM}
    assert made.stdout == ""


def test_options_of_the_progress_may_differ() -> None:
    def facts(*words: str) -> dict[str, str]:
        ranks = Mock()
        check_same_options(ranks, parse_args(build_parser(), ["generate", "-p", "a", *words]))
        found: dict[str, str] = ranks.check_equal.call_args.args[0]
        return found

    assert facts("--quiet", "--show", "--open", "--json-events", "--allow-sleep") == facts()
    assert facts("--dry-run") != facts()


def test_ranks_edit(tmp_path: Path) -> None:
    save_frames(tmp_path / "a.png", np.full((1, 32, 32, 3), 90, np.uint8), 24, None, False)
    edit = ("edit", "a.png", "--source-prompt", "a red circle", "-p", "a", "--sampler", "rflow")
    made = launch(2, [*GENERATE[:2], *edit, *GENERATE[3:], "-o", "b.png"], cwd=tmp_path)
    assert made.codes == [0, 0], made.stderr
    settings = read_metadata(tmp_path / "b.png")["settings"]
    assert (settings["text"], settings["sampler"]) == ("a", "rflow")
