"""Small films and patched containers, as phones and cameras write them."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

#: Luma weights of red and blue of FFmpeg's matrices.
WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


def shades(count: int) -> np.ndarray:
    """Frames [count, 16, 32, 3], each lighter than the one before it."""
    values = np.linspace(40, 200, count).round().astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, 16, 32, 3)).copy()


def corner() -> np.ndarray:
    """Three equal frames [3, 16, 32, 3]: black, white at the top left."""
    frames = np.zeros((3, 16, 32, 3), np.uint8)
    frames[:, :4, :4] = 255
    return frames


def patch(path: Path, box: bytes, offset: int, layout: str, *values: int) -> None:
    """Overwrite numbers in a box of an mp4, `offset` bytes after the box's name."""
    data = bytearray(path.read_bytes())
    start = data.index(box) + 4 + offset
    data[start : start + struct.calcsize(layout)] = struct.pack(layout, *values)
    path.write_bytes(data)


def write_timed(path: Path, pictures: np.ndarray, times: list[int]) -> Path:
    """Write frames that are shown at `times`, in hundredths of a second."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 100)
        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def planes(rgb: tuple[int, int, int], matrix: int, full: bool) -> list[int]:
    """Y, U and V of 8 bits."""
    (kr, kb), (r, g, b) = WEIGHTS[matrix], (value / 255 for value in rgb)
    y = kr * r + (1 - kr - kb) * g + kb * b
    u, v = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
    levels = (255 * y, 128 + 255 * u, 128 + 255 * v)
    limited = (16 + 219 * y, 128 + 224 * u, 128 + 224 * v)
    return [min(255, round(each)) for each in (levels if full else limited)]


def write_yuv(
    path: Path, yuv: list[int], tags: dict[str, int], size: tuple[int, int] = (64, 64)
) -> Path:
    """Write three lossless frames of one colour; `tags` are attributes of the codec context."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=24, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        y, u, v = (np.full(n, each) for n, each in zip((4, 1, 1), yuv, strict=True))
        flat = np.repeat(np.concatenate([y, u, v]), width * height // 4)
        for index in range(3):
            picture = flat.astype(np.uint8).reshape(height * 3 // 2, width)
            frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
            frame.colorspace = tags.get("colorspace", 2)
            frame.color_range = tags.get("color_range", 0)
            frame.pts, frame.time_base = index, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
