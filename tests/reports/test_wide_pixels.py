"""Videos whose pixels are not square: DVDs, DV and HDV cameras.

huceke/omxplayer 3, dirkvdb/ffmpegthumbnailer 120.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from mlx_sora.geometry import Size
from mlx_sora.video.reader import probe_video, read_video
from tests.helpers.media import planes, write_yuv


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [
        (Fraction(4, 3), Size(64, 64)),
        (Fraction(16, 15), Size(51, 64)),
        (Fraction(8, 9), Size(43, 64)),
        (Fraction(1), Size(48, 64)),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_pixels_become_square(tmp_path: Path, ratio: Fraction, shown: Size, suffix: str) -> None:
    tags = {"sample_aspect_ratio": ratio}
    path = write_yuv(tmp_path / f"a{suffix}", planes((200, 60, 60), 6, False), tags, (48, 64))
    assert probe_video(path).size == shown
    assert read_video(path).frames.shape == (3, shown.height, shown.width, 3)
