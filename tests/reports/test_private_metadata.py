"""Records inside videos that name the folders of their maker.

Report: invoke-ai/InvokeAI#1450 (absolute paths of images in the metadata).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mlx_sora import Pipeline
from mlx_sora.cli.main import main
from mlx_sora.cli.requests import recorded_options
from mlx_sora.errors import UsageError
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.video.metadata import read_metadata


@pytest.fixture
def made(pipe: Pipeline, tmp_path: Path) -> Path:
    """A video made with a picture that its prompt names."""
    folder = tmp_path / "ann"
    folder.mkdir()
    Image.new("RGB", (64, 64), "blue").save(folder / "blue.png")
    directives = {"reference_path": str(folder / "blue.png"), "mask_strategy": "0,0,0,0,1,0"}
    request = GenerationRequest.from_dict(
        {
            "prompt": f"red {json.dumps(directives)}",
            "steps": 1,
            "num_frames": 17,
            "seed": 1,
            "output": str(folder / "a.mp4"),
            "metadata": True,
        }
    )
    list(pipe.stream(request))
    return folder


def test_no_folder_is_recorded(made: Path, tmp_path: Path) -> None:
    for name in ("a.mp4", "a.json"):
        record = json.dumps(read_metadata(made / name))
        assert str(tmp_path) not in record
        assert "blue.png" in record
        assert '"output": "a.mp4"' in record


def test_a_home_folder_is_one_too(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "secret").mkdir()
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "secret" / "blue.png")
    directives = {"reference_path": "~/secret/blue.png", "mask_strategy": "0,0,0,0,1,0"}
    video = pipe(f"red {json.dumps(directives)}", steps=1, num_frames=17, seed=1)
    assert "secret" not in json.dumps(video.metadata)


def test_a_replay_finds_media_beside_the_video(made: Path, tmp_path: Path) -> None:
    moved = tmp_path / "bob"
    shutil.copytree(made, moved)
    shutil.rmtree(made)
    options = recorded_options(str(moved / "a.mp4"), {})
    assert str(moved / "blue.png") in options["prompt"]
    (moved / "blue.png").unlink()
    with pytest.raises(UsageError, match=r"blue.png, which .*a.mp4 was made with, is not beside"):
        recorded_options(str(moved / "a.mp4"), {})
    assert "prompt" in recorded_options(str(moved / "a.mp4"), {"prompt": "typed"})


def test_a_picture_of_a_flag_is_found_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "ann"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    run = ["generate", "--prompt=red", f"--image={folder / 'red.png'}", "--num-frames=17"]
    assert main([*run, "--steps=1", "--seed=1", f"--output={folder / 'a.mp4'}", "--quiet"]) == 0
    assert str(tmp_path) not in json.dumps(read_metadata(folder / "a.mp4"))
    replay = ["generate", f"--config-from-metadata={folder / 'a.mp4'}", "--dry-run"]
    assert main(replay) == 0
    (folder / "red.png").rename(folder / "other.png")
    assert main(replay) == 2
    assert "--image" in capsys.readouterr().err
    assert main([*replay, f"--image={folder / 'other.png'}"]) == 0
