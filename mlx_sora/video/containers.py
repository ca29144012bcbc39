"""Opening videos that somebody else made, without reading other files or taking all memory.

FFmpeg takes a file for what its content says: a playlist named .mp4 would make it open whatever
that lists, and a box of a few bytes in an mp4 makes it allocate an index of any length.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mlx_sora.errors import UsageError

#: FFmpeg's names of the containers that are read.
VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"

#: Pillow's names of the pictures that are read. Others bring programs (EPS), or nothing but risk.
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "HEIF",
)

#: Pixels of a picture or a frame: 8K video has 33 million. RGB takes three bytes of each, and
#: what decodes it as much again.
MAX_PIXELS = 40_000_000

#: Frames of a video: more than two hours at 30 a second.
MAX_PACKETS = 250_000

#: Boxes of an mp4 that hold boxes.
_PARENT_BOXES = (
    b"moov",
    b"trak",
    b"mdia",
    b"minf",
    b"stbl",
    b"moof",
    b"traf",
    b"mvex",
    b"edts",
    b"dinf",
    b"tref",
    b"wave",
    b"udta",
)


def open_container(path: str | Path) -> Any:
    """A PyAV container. Raises UsageError for claims that cannot be true, and what PyAV raises."""
    import av

    _check_sample_counts(Path(path))
    options = {
        "format_whitelist": VIDEO_FORMATS,
        "protocol_whitelist": "file",
        "max_pixels": str(MAX_PIXELS),
    }
    # With its protocol spelt out, no part of a name is taken for one, such as concat:.
    return av.open(f"file:{os.path.abspath(path)}", options=options)


@contextmanager
def open_image(path: str | Path, formats: Sequence[str] = IMAGE_FORMATS) -> Iterator[Any]:
    """A Pillow image, its pixels unread. Raises UsageError for too many, and what Pillow raises."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damage that does not matter, and of large pictures
        Image.init()
        known = [name for name in formats if name in Image.OPEN]
        with Image.open(path, formats=known) as image:
            check_pixels(path, *image.size)
            yield image


def check_pixels(path: str | Path, width: int, height: int) -> None:
    """Raise UsageError for a picture that would take too much memory."""
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"{path} has {width}x{height} pixels.", f"Give {MAX_PIXELS / 1e6:g} million at most."
        )


def _check_sample_counts(path: Path) -> None:
    """Raise UsageError for an mp4 with more samples than the file has bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for count in _sample_counts(file, 0, size):
            if count > size:
                raise UsageError(
                    f"Cannot read {path}: it claims {count} frames in {size} bytes.",
                    "Is it damaged?",
                )


def _sample_counts(file: BinaryIO, start: int, end: int, depth: int = 0) -> Iterator[int]:
    """Samples claimed by the boxes between two places of an mp4; what is none has no such boxes."""
    while start + 8 <= end and depth < len(_PARENT_BOXES):
        file.seek(start)
        head = file.read(32)
        length, kind, header = int.from_bytes(head[:4], "big"), head[4:8], 8
        if length == 1:
            length, header = int.from_bytes(head[8:16], "big"), 16
        stop = start + length if length else end
        if length and length < header:
            return
        if kind in _PARENT_BOXES:
            yield from _sample_counts(file, start + header, min(stop, end), depth + 1)
        fields = head[header:]
        if kind == b"stsz" and any(fields[4:8]):  # all samples of one size: no table behind it
            yield int.from_bytes(fields[8:12], "big")
        elif kind == b"trun":
            yield int.from_bytes(fields[4:8], "big")
        start = stop
