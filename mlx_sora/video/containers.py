"""Open untrusted videos and images without reading other files or using all memory.

FFmpeg decides by content, not by name: a playlist named .mp4 would make it open the files that it
lists. A box of a few bytes in an mp4 makes it allocate an index of any length.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from mlx_sora.errors import UsageError, shell_words

#: FFmpeg's names of the containers that are read.
VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"

#: Pillow's names of the image formats that are read. Others run programs (EPS) or are rare.
IMAGE_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM"),
    *("AVIF", "JPEG2000", "HEIF"),
)

#: Largest number of pixels of a video: 8K has 33 million.
MAX_PIXELS = 40_000_000

#: Most memory that a picture may take, and what one takes: Pillow has four bytes a pixel, for the
#: picture, for the turned one and for the one in sRGB.
MAX_IMAGE_BYTES, IMAGE_BYTES_PER_PIXEL = 2 << 30, 12

#: Brands of HEIF and AVIF files, which Pillow reads with pillow-heif only, or from 11.3 on.
HEIF_BRANDS = b"heic heix heim heis hevc hevx mif1 msf1 avif avis".split()

#: Largest number of frames of a video: more than two hours at 30 a second.
MAX_PACKETS = 250_000

#: Boxes of an mp4 that contain boxes.
_PARENT_BOXES = b"moov trak mdia minf stbl moof traf mvex edts dinf tref wave udta".split()


def open_container(path: str | Path) -> Any:
    """Open a PyAV container. Raises UsageError for impossible frame counts, and PyAV's errors."""
    import av

    _check_sample_counts(Path(path))
    options = {
        "format_whitelist": VIDEO_FORMATS,
        "protocol_whitelist": "file",
        "max_pixels": str(MAX_PIXELS),
    }
    # With the explicit protocol, FFmpeg takes no part of a name for one, such as concat:.
    return av.open(f"file:{os.path.abspath(path)}", options=options)


@contextmanager
def open_image(path: str | Path, formats: Sequence[str] = IMAGE_FORMATS) -> Iterator[Any]:
    """Open a Pillow image without reading its pixels.

    Raises UsageError for too many pixels and for formats that need another package, and Pillow's
    errors.
    """
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about minor damage and large images
        Image.init()
        heif = is_heif(path)
        if heif:
            _register_heif()
        known = [name for name in formats if name in Image.OPEN]
        try:
            image = Image.open(path, formats=known)
        except UnidentifiedImageError:
            if heif:
                raise _heif_error(path) from None
            raise
        except Image.DecompressionBombError:
            raise UsageError(f"{path} has too many pixels.", "Shrink it first.") from None
        with image:
            width, height = image.size
            if IMAGE_BYTES_PER_PIXEL * width * height > MAX_IMAGE_BYTES:
                raise UsageError(
                    f"{path} has {width}x{height} pixels, which take too much memory.",
                    "Shrink it first.",
                )
            yield image


def is_picture(path: str | Path) -> bool:
    """Return True if a file begins as a picture does, even one that cannot be read."""
    from PIL import Image

    Image.init()
    with Path(path).open("rb") as file:
        prefix = file.read(16)
    accepts = [Image.OPEN[name][1] for name in IMAGE_FORMATS if name in Image.OPEN]
    return is_heif(path) or any(accept is not None and accept(prefix) for accept in accepts)


def is_heif(path: str | Path) -> bool:
    """Return True for HEIC and AVIF by the brands at the beginning of a file."""
    with Path(path).open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def _register_heif() -> None:
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()


def _heif_error(path: str | Path) -> UsageError:
    return UsageError(
        f"{path} is a HEIC or AVIF picture that cannot be read here.",
        f'Run pip install "mlx-sora[heic]", or convert it, on macOS: {jpeg_command(path)}',
    )


def jpeg_command(path: str | Path) -> str:
    """Return the command of macOS that makes a JPEG of a picture."""
    return f"sips -s format jpeg {shell_words(path)} --out picture.jpg"


@contextmanager
def read_errors(path: str | Path, fix: str) -> Iterator[None]:
    """Turn errors in the block into UsageErrors: damaged files fail in many ways in libraries."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        # The text of an OSError, as PyAV's are, ends with the path once more.
        text = getattr(error, "strerror", None) or str(error)
        reason = (text.splitlines() or [type(error).__name__])[0][:120].rstrip(".")
        raise UsageError(f"Cannot read {path}: {reason}.", fix) from None


def check_pixels(path: str | Path, width: int, height: int) -> None:
    """Raise UsageError for an image that would take too much memory."""
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"{path} has {width}x{height} pixels.", f"Give {MAX_PIXELS / 1e6:g} million at most."
        )


def _check_sample_counts(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        for count in _sample_counts(file, 0, size):
            if count > size:
                raise UsageError(
                    f"Cannot read {path}: it claims {count} frames in {size} bytes.",
                    "Is it damaged?",
                )


def _sample_counts(file: BinaryIO, start: int, end: int, depth: int = 0) -> Iterator[int]:
    """Yield the sample counts in the boxes between two offsets of an mp4; other files have none."""
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
        if kind == b"stsz" and any(fields[4:8]):  # all samples have one size: no table follows
            yield int.from_bytes(fields[8:12], "big")
        elif kind == b"trun":
            yield int.from_bytes(fields[4:8], "big")
        start = stop
