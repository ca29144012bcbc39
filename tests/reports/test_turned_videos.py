"""Videos of phones that are turned or mirrored by the display matrix of their track.

PyAV-Org/PyAV 570, meta-pytorch/torchcodec 1084.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_sora.geometry import Size
from mlx_sora.video.reader import probe_video, read_video
from mlx_sora.video.writer import save_frames
from tests.helpers.media import corner, patch

ONE = 1 << 16

#: The matrix (a, b, c, d), and the corner to which the one at the top left goes.
TURNS = {
    "as it is": ((1, 0, 0, 1), "top left"),
    "to the right": ((0, 1, -1, 0), "top right"),
    "to the left": ((0, -1, 1, 0), "bottom left"),
    "upside down": ((-1, 0, 0, -1), "bottom right"),
    "mirrored": ((-1, 0, 0, 1), "top right"),
    "mirrored upside down": ((1, 0, 0, -1), "bottom left"),
    "transposed": ((0, 1, 1, 0), "top left"),
    "mirrored and turned": ((0, -1, -1, 0), "bottom right"),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_video_is_upright_and_not_mirrored(tmp_path: Path, turn: str) -> None:
    (a, b, c, d), place = TURNS[turn]
    path = save_frames(tmp_path / "a.mp4", corner(), 24)
    patch(path, b"tkhd", 40, ">9i", a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30)
    size = probe_video(path).size
    assert size == (Size(16, 32) if b else Size(32, 16))
    frame = read_video(path, 1).frames[0]
    assert frame.shape == (size.height, size.width, 3)
    corners = {"top": 1, "bottom": -2}, {"left": 1, "right": -2}
    row, column = (sides[word] for sides, word in zip(corners, place.split(), strict=True))
    assert frame[row, column].min() > 200
    assert np.count_nonzero(frame[..., 0] > 128) == 16
