"""Outputs of `generate`, of the bundled model: folders, formats, enlarged pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.reader import probe_video, read_video

GENERATE = [
    "generate",
    "-p",
    "square",
    "--model",
    "shapes",
    "--steps",
    "1",
    "--num-frames",
    "17",
    "--no-health-check",
]


def test_an_enlarged_film_in_a_new_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*GENERATE, "--seed", "3", "--scale", "3", "-o", "new/deep/{model}-{seed}.webm"]
    assert main([*words, "--dry-run"]) == 0
    planned = "writes 17 frames of 192x192 pixels (64x64, enlarged 3 times), 24 per second"
    assert planned in capsys.readouterr().out.splitlines()
    assert list(folder.iterdir()) == []
    assert main([*words, "--json-events", "--verbose", "--ci-dl"]) == 0
    out, err = capsys.readouterr()
    finished = json.loads(out.splitlines()[-1])
    for start in ("python ", "device: ", "model: shapes in /", "transformer: float32"):
        assert any(line.startswith(start) for line in err.splitlines())
    assert "decode: planned peak" in err
    assert "denoise: streamed blocks 4, resident 0" in err
    assert (finished["path"], finished["width"]) == ("new/deep/shapes-3.webm", 192)
    video = Path(finished["path"])
    assert (probe_video(video).size, probe_video(video).fps) == ((192, 192), 24)
    assert read_metadata(video)["request"]["scale"] == 3
    assert main(["generate", "-C", str(video), "-o", "again.mov"]) == 0
    again, frames = read_video("again.mov").frames, read_video(video).frames
    assert again.shape == frames.shape == (17, 192, 192, 3)
    assert abs(again.astype(float) - frames).mean() < 2
    assert main([*GENERATE, "--num-frames", "34", "--video", "again.mov", "-o", "on.gif"]) == 0
    assert probe_video("on.gif").size == (64, 64)


def test_a_run_that_fails_leaves_no_new_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("mlx_sora.pipeline.generate.denoise", fail)
    assert main([*GENERATE, "-o", "new/deep/a.mp4"]) == 1
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").touch()
    monkeypatch.setattr("mlx_sora.cli.generate.load_pipeline", None)
    assert main([*GENERATE, "-o", "file/new/a.mp4"]) == 2
    assert "file is not a folder. Change --output." in capsys.readouterr().err


def test_a_scale_that_nothing_can_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GENERATE, "--dry-run", "--scale", "100", "-o", "a.mp4"]) == 2
    assert main([*GENERATE, "--dry-run", "--resolution", "720p", "--scale", "8"]) == 2
    tall, wide = capsys.readouterr().err.splitlines()
    assert tall == "error: --scale 100 is out of range. Give 1 to 64."
    assert "--scale 8 makes 10240x5760 pixels" in wide
