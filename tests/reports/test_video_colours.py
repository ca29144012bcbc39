"""Colours of videos: matrices, ranges, missing tags, and HDR.

PyAV-Org/PyAV 2230 and 2149, LibrePhotos/librephotos 455, browser-use/video-use 6.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_sora.video.reader import probe_video, read_video
from tests.helpers.media import planes, write_yuv

COLOURS = [(255, 0, 0), (0, 255, 0), (30, 60, 220), (200, 120, 60), (250, 250, 250), (8, 8, 8)]
BT709, BT601, BT2020, P3, PQ, HLG = 1, 6, 9, 12, 16, 18


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [BT709, BT601, BT2020])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_matrix_and_range_are_undone(tmp_path: Path, matrix: int, full: bool, suffix: str) -> None:
    tags = {"colorspace": matrix, "color_range": 2 if full else 1, "color_primaries": matrix}
    for number, colour in enumerate(COLOURS):
        path = write_yuv(tmp_path / f"{number}{suffix}", planes(colour, matrix, full), tags)
        found = read_video(path).frames.astype(int)
        assert np.abs(found - colour).max() <= 2, (colour, found[0, 0, 0])


@pytest.mark.parametrize(("size", "matrix"), [((64, 64), BT601), ((1280, 720), BT709)])
def test_untagged_videos_are_taken_as_players_take_them(
    tmp_path: Path, size: tuple[int, int], matrix: int
) -> None:
    path = write_yuv(tmp_path / "a.mp4", planes(COLOURS[3], matrix, False), {}, size)
    found = read_video(path, 1).frames[0, 30, 30].astype(int)
    assert np.abs(found - COLOURS[3]).max() <= 2


def signal(transfer: int, brightness: float) -> int:
    """8-bit grey of a brightness in cd/m2."""
    if transfer == PQ:
        power = (brightness / 10_000) ** 0.1593017578125
        value = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    else:
        scene = (brightness / 1000) ** (1 / 1.2)
        value = (3 * scene) ** 0.5
        if scene > 1 / 12:
            value = 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073
    return round(255 * value)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_is_mapped_with_a_warning(tmp_path: Path, transfer: int) -> None:
    tags = {"colorspace": BT2020, "color_range": 2, "color_primaries": BT2020}
    tags["color_trc"] = transfer
    greys = []
    for brightness in (0, 20, 100, 203, 600, 1000):
        grey = signal(transfer, brightness)
        path = write_yuv(tmp_path / f"{brightness}.mp4", [grey, 128, 128], tags)
        (warning,) = probe_video(path).warnings
        assert "HDR" in warning
        colour = read_video(path, 1).frames[0, 9, 9].astype(int)
        assert np.ptp(colour) <= 2
        greys.append(colour[0])
    assert greys == sorted(greys)
    assert greys[0] == 0
    # A tenth and a half of white are as bright as in SDR, white is nearly so, highlights differ.
    assert abs(greys[1] - 89) <= 4
    assert abs(greys[2] - 185) <= 4
    assert 225 <= greys[3] < greys[4] <= greys[5] <= 255


def test_display_p3_becomes_srgb(tmp_path: Path) -> None:
    tags = {"colorspace": BT709, "color_range": 1, "color_primaries": P3, "color_trc": BT709}
    path = write_yuv(tmp_path / "a.mp4", planes((200, 60, 60), BT709, False), tags)
    found = read_video(path, 1).frames[0, 9, 9].astype(int)
    assert np.abs(found - (217, 42, 52)).max() <= 3
    assert probe_video(path).warnings == ()
