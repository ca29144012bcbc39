"""Animated GIF, WebP and PNG files as videos; equal frames, which Pillow joins; pauses.

Kosinkadink/ComfyUI-VideoHelperSuite 302, python-pillow/Pillow 7613 and 8397.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.reader import is_video, probe_video, read_image, read_video
from mlx_sora.video.writer import save_frames
from tests.helpers.media import shades

#: Frames that are equal to the one before them.
PAUSES = {"none": [], "at the start": range(1, 7), "inside": range(11, 16), "at the end": [18, 19]}


def record(fps: float, frames: int) -> dict[str, Any]:
    return {"request": {}, "settings": {"fps": fps, "num_frames": frames}}


@pytest.mark.parametrize("pause", PAUSES)
@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
@pytest.mark.parametrize("recorded", [False, True])
def test_equal_frames_come_back(tmp_path: Path, name: str, pause: str, recorded: bool) -> None:
    frames = shades(20)
    for index in PAUSES[pause]:
        frames[index] = frames[index - 1]
    path = save_frames(tmp_path / name, frames, 24, record(24, 20) if recorded else None)
    info = probe_video(path)
    assert (info.num_frames, info.fps, info.size) == (20, 24, Size(32, 16))
    found = read_video(path, info=info).frames.astype(int)
    assert np.abs(found - frames).max() <= 5
    part = read_video(path, 5, start=12).frames.astype(int)
    assert np.abs(part - frames[12:17]).max() <= 5


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_a_film_of_equal_pairs_or_of_one_picture_keeps_its_length(
    tmp_path: Path, name: str
) -> None:
    for number, frames in enumerate((shades(10).repeat(2, axis=0), shades(1).repeat(20, axis=0))):
        path = save_frames(tmp_path / f"{number}{name}", frames, 24, record(24, 20))
        assert is_video(path)
        assert (probe_video(path).num_frames, probe_video(path).fps) == (20, 24)
        assert np.abs(read_video(path).frames.astype(int) - frames).max() <= 5


def test_animated_png_without_its_default_image(tmp_path: Path) -> None:
    pictures = [Image.fromarray(frame) for frame in shades(6)]
    cover = Image.new("RGB", pictures[0].size, (255, 0, 0))
    cover.save(
        tmp_path / "a.png", save_all=True, append_images=pictures, default_image=True, duration=100
    )
    info = probe_video(tmp_path / "a.png")
    assert (info.num_frames, info.fps) == (6, 10)
    assert np.array_equal(read_video(tmp_path / "a.png").frames, shades(6))


def test_hurried_gifs_last_as_browsers_show_them(tmp_path: Path) -> None:
    pictures = [Image.fromarray(frame).quantize() for frame in shades(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=0)
    assert (probe_video(tmp_path / "a.gif").num_frames, probe_video(tmp_path / "a.gif").fps) == (
        4,
        10,
    )


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    video = save_frames(tmp_path / "a.mp4", shades(5), 24).rename(tmp_path / "a.png")
    animation = save_frames(tmp_path / "b.webp", shades(5), 24).rename(tmp_path / "b.mp4")
    picture = save_frames(tmp_path / "c.png", shades(1), 24).rename(tmp_path / "c.gif")
    assert [is_video(path) for path in (video, animation, picture)] == [True, True, False]
    assert probe_video(video).num_frames == probe_video(animation).num_frames == 5
    assert read_image(picture).shape == (16, 32, 3)
    with pytest.raises(UsageError, match=r"c.gif is an image"):
        probe_video(picture)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.json"])
def test_a_record_is_found_under_any_name(tmp_path: Path, name: str) -> None:
    made = record(24, 5)
    if name == "a.json":
        (tmp_path / name).write_text(json.dumps(made))
    else:
        save_frames(tmp_path / name, shades(5), 24, made)
    assert read_metadata((tmp_path / name).rename(tmp_path / "b.bin")) == made
