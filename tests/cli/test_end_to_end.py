"""The command line in real processes with the bundled model."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
from PIL import Image

from mlx_sora.loading.model_folder import PUBLISHED, find_model

PROMPT = "a red circle moving right on a black background"
COMMAND = [sys.executable, "-m", "mlx_sora"]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], cwd=folder, capture_output=True, text=True, check=False
    )


def generate(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "generate", "-p", PROMPT, "--steps", "2", *words)


def test_generate_writes_a_video(tmp_path: Path) -> None:
    result = generate(tmp_path, "--seed", "7")
    assert result.returncode == 0, result.stderr
    path = tmp_path / result.stdout.strip()
    assert [path] == list(tmp_path.iterdir())
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert (len(frames), frames[0].width, frames[0].height) == (17, 64, 64)
    for word in ("seed 7", "encode", "denoise", "decode", "peak"):
        assert word in result.stderr


def test_seeds_make_one_file_each(tmp_path: Path) -> None:
    result = generate(tmp_path, "--seed", "1", "2", "--num-frames", "1", "-o", "{seed}.png")
    assert result.returncode == 0, result.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1.png", "2.png"]


def test_replay_repeats_the_pixels(tmp_path: Path) -> None:
    assert generate(tmp_path, "--seed", "5", "-o", "a_%02d.png").returncode == 0
    replay = run(tmp_path, "generate", "-C", "a_00.png", "-o", "b_%02d.png")
    assert replay.returncode == 0, replay.stderr
    for number in range(17):
        first, second = (Image.open(tmp_path / f"{n}_{number:02d}.png") for n in "ab")
        assert first.tobytes() == second.tobytes()


def test_fallback_to_the_bundled_model_is_announced(tmp_path: Path) -> None:
    result = generate(tmp_path)
    assert result.returncode == 0
    notices = [line for line in result.stderr.splitlines() if PUBLISHED in line]
    assert len(notices) == 1
    assert "shapes" in notices[0]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["-p", ""], 2, "prompt"),
        (["--num-frames", "5"], 2, "17"),
        (["--width", "4", "--height", "4"], 2, "impossible"),
        (["--resolution", "241p"], 2, "240p"),
        (["--sampler", "magic"], 2, "rflow"),
        (["--stepps", "3"], 2, "--steps"),
        (["-o", "taken.mp4/a.mp4"], 2, "is not a folder"),
        (["-o", "a.avi"], 2, ".mp4"),
        (["-o", "taken.mp4"], 2, "--overwrite"),
        (["--model", "gone"], 4, "gone"),
        (["--model", "opensora-1.2"], 4, "opensora-1.2"),
        (["-C", "gone.mp4"], 2, "gone.mp4"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_are_one_line(tmp_path: Path, words: list[str], code: int, says: str) -> None:
    (tmp_path / "taken.mp4").write_bytes(b"precious")
    result = generate(tmp_path, *words)
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert says in lines[0]
    assert "Traceback" not in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["taken.mp4"]
    assert (tmp_path / "taken.mp4").read_bytes() == b"precious"


def test_wrong_weights_exit_with_4(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(find_model("shapes").path, model)
    shutil.copy(model / "vae" / "model.safetensors", model / "transformer" / "model.safetensors")
    result = generate(tmp_path, "--model", str(model), "-o", "a.mp4")
    assert result.returncode == 4
    assert "unexpected tensor" in result.stderr
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_interrupt_leaves_no_file(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "-p", PROMPT, "--steps", "1000", "--json-events", "-o", "a.mp4"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step_finished" in line:
            break
    time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_info_shows_model_and_machine(tmp_path: Path) -> None:
    result = run(tmp_path, "info", "--model", "shapes")
    assert result.returncode == 0
    for word in ("shapes", "parameters", "transformer", "backend", "mlx"):
        assert word in result.stdout
