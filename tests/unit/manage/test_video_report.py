"""Estimates of videos on a measured machine: time, memory, and the options that make them fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_sora.manage import video_report
from mlx_sora.manage.video_report import VIDEOS, estimate_videos
from mlx_sora.pipeline import settings
from tests.helpers.speeds import SPEEDS


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that `auto` allows, to be changed by a test; there are no models."""
    bytes_allowed = [64 * 10**9]
    monkeypatch.setenv("MLX_SORA_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(settings, "resolve_budget", lambda *_: bytes_allowed[0])
    monkeypatch.setattr(video_report, "VIDEOS", (("240p", 1), ("720p", 51)))
    return bytes_allowed


def test_much_memory_needs_no_options(memory: list[int]) -> None:
    image, video = estimate_videos(SPEEDS)
    assert (image.name, video.name) == ("240p, an image", "720p, 51 frames")
    assert image.options == video.options == ""
    for each in (image, video):
        assert each.seconds is not None
        assert each.fast_seconds is not None
        assert each.fast_seconds < each.seconds
        assert each.peak <= memory[0]
    assert image.seconds is not None
    assert video.seconds is not None
    assert image.seconds * 10 < video.seconds


def test_little_memory_needs_options(memory: list[int]) -> None:
    memory[0] = 4 * 10**9
    image, video = estimate_videos(SPEEDS)
    assert image.options == ""
    assert video.options.startswith("--")
    assert video.peak <= memory[0]
    assert video.options in str(video)


def test_what_fits_with_no_option_is_named(memory: list[int]) -> None:
    memory[0] = 10**9
    *_, video = estimate_videos(SPEEDS)
    assert video.seconds is None
    assert str(video) == "does not fit into this memory"


def test_the_table_goes_from_small_to_large() -> None:
    assert VIDEOS[0] == ("144p", 51)
    assert ("240p", 51) in VIDEOS
