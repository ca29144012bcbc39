"""The command line on two ranks: rank 0 alone prints and writes; all have one exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.writer import save_frames
from tests.helpers.ranks import ROOT, free_ports, launch

GENERATE = ("-m", "mlx_sora", "generate", "--steps", "1", "--width", "32", "--height", "32")


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_mlx_launch_starts_one_video(tmp_path: Path) -> None:
    """Under MLX's own launcher, only rank 0 prints and writes."""
    port = str(free_ports(1)[0])
    launcher = (str(Path(sys.executable).with_name("mlx.launch")), "-n", "2")
    words = (*GENERATE, "-p", "a red circle", "-o", "a.png", "--num-frames", "1")
    result = subprocess.run(
        [*launcher, "-p", port, "--env", f"PYTHONPATH={ROOT}", "--", sys.executable, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
        check=False,
    )
    assert result.stdout.split() == ["a.png"], result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert result.stderr.count("peak process") == 1
    assert read_metadata(tmp_path / "a.png")["parallel"] == {"ranks": 2, "mode": "guidance"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the videos of a prompt file."""
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run four prompts on two ranks; the folder of the second does not exist."""
    texts = ('"a.png"', '"nowhere/a.png"', '"b_%02d.png", "num_frames": 17', '"c.png"')
    prompts = (f'{{"prompt": "a circle", "seed": 1, "output": {text}}}' for text in texts)
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    words = ("--prompt-file", "prompts.jsonl", "--num-frames", "1", "--metadata")
    return launch(2, [*GENERATE, *words], cwd=folder)


def test_ranks_make_prompts_side_by_side(
    results: list[subprocess.CompletedProcess[str]], folder: Path
) -> None:
    assert results[0].stdout.split() == ["a.png", "b_%02d.png", "c.png"]
    files = {file.name for file in folder.iterdir()} - {"prompts.jsonl"}
    frames = {f"b_{i:02d}.png" for i in range(17)}
    assert files == {"a.png", "a.json", "b.json", "c.png", "c.json", *frames}
    for name in ("a.png", "b_00.png", "c.png"):
        assert read_metadata(folder / name)["parallel"] == {"ranks": 2, "mode": "prompts"}


def test_a_failed_prompt_is_reported_once(
    results: list[subprocess.CompletedProcess[str]],
) -> None:
    assert [each.returncode for each in results] == [2, 2]
    (error,) = lines(results[0].stderr)
    assert error.startswith("error: line 2: The folder nowhere does not exist.")
    assert (results[1].stdout, results[1].stderr) == ("", "")


def test_a_usage_error_is_reported_once(
    results: list[subprocess.CompletedProcess[str]], folder: Path
) -> None:
    again = launch(2, [*GENERATE, "-p", "a circle", "-o", "a.png"], cwd=folder)
    assert [each.returncode for each in again] == [2, 2]
    assert lines(again[0].stderr) == [
        "error: a.png exists already. Give --overwrite or another --output."
    ]
    assert (again[1].stdout, again[1].stderr) == ("", "")


def test_rank_0_reads_standard_input_for_all(tmp_path: Path) -> None:
    save_frames(tmp_path / "a.png", np.full((1, 32, 32, 3), 90, np.uint8), 24, None, False)
    edit = ("edit", "a.png", "--source-prompt", "a red circle", "-p", "-", "--sampler", "rflow")
    words = [*GENERATE[:2], *edit, *GENERATE[3:], "-o", "b.png"]
    made = launch(2, words, cwd=tmp_path, stdin="from a pipe\n")
    assert [each.returncode for each in made] == [0, 0], made[0].stderr
    settings = read_metadata(tmp_path / "b.png")["settings"]
    assert (settings["text"], settings["sampler"]) == ("from a pipe", "rflow")


def test_parallel_off_on_two_ranks_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    words = (*GENERATE[:2], "edit", "a.png", "--source-prompt", "a", "-p", "b")
    ranks = launch(2, [*words, "--parallel", "off"], cwd=tmp_path)
    assert [each.returncode for each in ranks] == [2, 2]
    assert lines(ranks[0].stderr)[0].startswith("error: --parallel off is for a single process")


def test_a_command_for_one_process_is_refused(folder: Path) -> None:
    ranks = launch(2, ["-m", "mlx_sora", "info"], cwd=folder)
    assert [each.returncode for each in ranks] == [2, 2]
    assert lines(ranks[0].stderr) == [
        "error: info runs in one process, not in several. Start it without mlx.launch."
    ]
