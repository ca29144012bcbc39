"""Cover art, which FFmpeg shows as a video stream, before the film or without one.

UltraStar-Deluxe/USDX 902, quodlibet/mutagen 661.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size
from mlx_sora.video.films import choose_stream
from mlx_sora.video.reader import probe_video
from tests.helpers.media import planes, write_yuv


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def cover(path: Path) -> None:
    """Add the metadata of a cover of 64x64 at the end of an mp4's index, which is last."""
    import io

    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "jpeg")
    item = box(b"covr", box(b"data", struct.pack(">II", 13, 0), picture.getvalue()))
    handler = box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
    user = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", item)))
    data = path.read_bytes()
    start = data.index(b"moov") - 4
    length = int.from_bytes(data[start : start + 4], "big")
    assert start + length == len(data), "the index is last"
    path.write_bytes(
        data[:start] + struct.pack(">I", length + len(user)) + data[start + 4 :] + user
    )


def test_a_cover_is_not_the_film(tmp_path: Path) -> None:
    path = write_yuv(tmp_path / "a.mp4", planes((200, 60, 60), 1, False), {}, (32, 16))
    cover(path)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    info = probe_video(path)
    assert (info.size, info.num_frames) == (Size(32, 16), 3)


def stream(codec: str, side: int, disposition: int) -> Any:
    context = SimpleNamespace(name=codec, width=side, height=side)
    return SimpleNamespace(codec_context=context, disposition=disposition)


@pytest.mark.parametrize("first", [True, False])
def test_the_film_is_found_wherever_it_stands(first: bool) -> None:
    others = [stream("mjpeg", 900, 0x400), stream("png", 900, 0), stream("h264", 90, 1)]
    film = stream("h264", 400, 1)
    streams = [film, *others] if first else [*others, film]
    container = SimpleNamespace(streams=SimpleNamespace(video=streams))
    assert choose_stream("a.mp4", container) is film


def test_a_song_with_a_cover_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        sound: Any = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    cover(tmp_path / "a.mp4")
    with pytest.raises(UsageError, match="no video stream"):
        probe_video(tmp_path / "a.mp4")
