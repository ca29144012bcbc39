"""Videos that were trimmed without encoding: edit lists hide frames that are in the file.

vllm-project/vllm 48608, cvat-ai/cvat 6929.
"""

from __future__ import annotations

import gc
from pathlib import Path

import av
import numpy as np
import pytest

from mlx_sora.video.films import open_film
from mlx_sora.video.reader import probe_video, read_video
from mlx_sora.video.writer import save_frames
from tests.helpers.media import patch, shades


@pytest.mark.parametrize(("skipped", "shown"), [(0, 40), (10, 30), (10, 20), (0, 5)])
def test_only_what_is_shown_counts(tmp_path: Path, skipped: int, shown: int) -> None:
    path = save_frames(tmp_path / "a.mp4", shades(40), 24)
    data = path.read_bytes()
    units = int.from_bytes(data[(at := data.index(b"mdhd") + 16) : at + 4], "big")
    first = int.from_bytes(data[(at := data.index(b"elst") + 16) : at + 4], "big")
    patch(path, b"elst", 8, ">Ii", round(1000 * shown / 24), first + skipped * units // 24)
    info = probe_video(path)
    assert (info.num_frames, round(info.fps, 2)) == (shown, 24)
    frames = read_video(path, info=info).frames
    assert np.abs(frames[:, 8, 8, 0] - shades(40)[skipped:, 8, 8, 0][:shown].astype(int)).max() <= 3


def test_decoded_frames_are_freed_at_once(tmp_path: Path) -> None:
    """One whose side data was read stays until Python's garbage collector runs."""
    path = save_frames(tmp_path / "a.mp4", shades(40), 24)
    gc.collect()
    gc.disable()
    try:
        with open_film(path) as film:
            assert len(list(map(str, film.frames()))) == 40
        assert sum(isinstance(each, av.VideoFrame) for each in gc.get_objects()) <= 2
    finally:
        gc.enable()
