"""A finished video in a notebook: its player, its one line of text, frames and other formats."""

from __future__ import annotations

import re
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest

from mlx_sora import GenerationRequest, Video
from mlx_sora.errors import UsageError
from mlx_sora.video import notebook
from mlx_sora.video.reader import read_image, read_video
from mlx_sora.video.writer import save_frames

PROMPT = 'a "red" <b>circle</b> & more ' * 5
FRAMES = np.random.default_rng(1).integers(0, 256, (3, 32, 48, 3), np.uint8)


def make(frames: np.ndarray = FRAMES, path: Path | None = None) -> Video:
    count, height, width, _ = frames.shape
    decoded = frames if path is None else None
    if path is not None:
        save_frames(path, frames, 8)
    request = GenerationRequest(PROMPT)
    return Video(
        path, request, width, height, count, 8, 5, ("<a> & b",), metadata={"a": 1}, decoded=decoded
    )


def shown(video: Video, folder: Path) -> tuple[str, Path]:
    """The element of the page, and a file with the bytes inside it."""
    page = video._repr_html_()
    tag, kind, content = re.search(r'<(video|img).* src="data:(.*);base64,(.*?)"', page).groups()  # type: ignore[union-attr]
    assert kind.startswith({"img": "image/"}.get(tag, tag))
    file = folder / f"shown.{kind.rpartition('/')[2]}"
    file.write_bytes(b64decode(content, validate=True))
    return page, file


def test_a_notebook_plays_a_video_in_memory(tmp_path: Path) -> None:
    page, file = shown(make(), tmp_path)
    assert "autoplay loop muted controls" in page
    assert 'width="240"' in page, "five times as large"
    assert "image-rendering: pixelated" in page
    assert "48x32, 3 frames, 8 fps, seed 5" in page
    assert "warning: &lt;a&gt; &amp; b" in page
    assert "<b>" not in page
    assert "&quot;red&quot; &lt;b&gt;circle" in page
    assert read_video(file).frames.shape == FRAMES.shape


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp"])
def test_a_notebook_shows_the_file_as_it_is(tmp_path: Path, name: str) -> None:
    page, file = shown(make(path=tmp_path / name), tmp_path)
    assert file.read_bytes() == (tmp_path / name).read_bytes()
    assert str(tmp_path / name) in page


def test_a_notebook_shows_a_picture_exactly_and_odd_sizes(tmp_path: Path) -> None:
    page, file = shown(make(FRAMES[:1]), tmp_path)
    assert np.array_equal(read_image(file), FRAMES[0])
    assert ' alt="a &quot;red' in page
    _, file = shown(make(FRAMES[:, :31, :47]), tmp_path)
    assert read_video(file).frames.shape == (3, 31, 47, 3)
    _, file = shown(make(path=tmp_path / "f_%d.png"), tmp_path)
    assert len(read_video(file).frames) == 3


def test_large_videos_and_lost_files_are_only_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make(path=tmp_path / "a.mp4")
    monkeypatch.setattr(notebook, "MAX_BYTES", 10)
    assert "too many" in video._repr_html_()
    (tmp_path / "a.mp4").unlink()
    page = video._repr_html_()
    assert "Cannot show it: " in page
    assert "a.mp4" in page
    assert "data:" not in page


def test_large_frames_are_not_enlarged() -> None:
    page = make(np.zeros((1, 200, 300, 3), np.uint8))._repr_html_()
    assert 'width="300"' in page
    assert "pixelated" not in page


def test_one_line_says_what_a_video_is(tmp_path: Path) -> None:
    expected = 'Video(in memory, 48x32, 3 frames, 8 fps, seed=5, prompt=\'a "red" <b>circle'
    assert repr(make()).startswith(expected)
    assert len(repr(make())) < 150
    picture = make(FRAMES[:1], tmp_path / "a.png")
    assert repr(picture).startswith(f"Video('{tmp_path}/a.png', 48x32, image, seed=5, ")


def test_frames_are_read_back_once(tmp_path: Path) -> None:
    exact = make(path=tmp_path / "f_%d.png")
    assert np.array_equal(exact.frames, FRAMES)
    assert exact.frames is exact.frames
    picture = make(FRAMES[:1], tmp_path / "a.png")
    assert np.array_equal(picture.frames, FRAMES[:1])
    grey = np.full((4, 16, 16, 3), 100, np.uint8)
    for name in ("a.mp4", "a.gif", "a.webp"):
        found = make(grey, tmp_path / name).frames
        assert found.shape == grey.shape
        assert np.abs(found.astype(int) - grey).max() <= 2
    gone = make(FRAMES[:1], tmp_path / "gone.png")
    (tmp_path / "gone.png").unlink()
    with pytest.raises(UsageError, match="No such file: .*gone.png"):
        gone.frames  # noqa: B018
