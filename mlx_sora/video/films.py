"""Films: frames of video files as FFmpeg decodes them, as they are shown.

Edit lists and discarded packets are FFmpeg's business: only frames that are shown come out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size
from mlx_sora.video.colour import HDR, RGBConverter
from mlx_sora.video.containers import MAX_PIXELS, check_pixels, open_container
from mlx_sora.video.timing import TimedFrame

if TYPE_CHECKING:
    import numpy as np

#: FFmpeg's flag of a stream that is a cover, and codecs of covers that have no such flag.
ATTACHED_PICTURE, DEFAULT = 0x400, 0x1
PICTURE_CODECS = {"mjpeg", "png", "bmp", "gif", "tiff", "webp"}


#: Threads that decode; each takes frames of memory.
THREADS = 4


@dataclass(frozen=True)
class Orientation:
    """Turn of a frame for showing: rows and columns exchanged, then each side reversed."""

    transposed: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def from_frame(cls, frame: Any) -> Orientation:
        """Read the display matrix of a PyAV frame, to the nearest quarter turn."""
        import struct

        data = frame.side_data.get("DISPLAYMATRIX")
        if data is None or len(bytes(data)) < struct.calcsize("9i"):
            return cls()
        a, b, _, c, d, *_ = struct.unpack("9i", bytes(data)[: struct.calcsize("9i")])
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turn pixels [H, W, 3]."""
        if self.transposed:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


class Film:
    """The film of an open container.

    rate: frames per second according to the file, None if it does not say.
    """

    def __init__(self, path: str | Path, container: Any) -> None:
        self._path, self._container = path, container
        self.recorded: float | None = None
        self._stream = choose_stream(path, container)
        self._converter = RGBConverter()
        codec = self._stream.codec_context
        check_pixels(path, codec.width, codec.height)
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        self._stream.thread_type, codec.thread_count = "AUTO", THREADS
        self.rate: float | None = float(self._stream.average_rate or 0) or None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines about changes of the colours; complete once a frame was decoded."""
        name = HDR.get(int(self._stream.codec_context.color_trc or 0))
        if name is None:
            return ()
        return (f"{self._path} is HDR ({name}); its colours are mapped to the standard range.",)

    def frames(self) -> Iterator[TimedFrame]:
        """Decode the frames that are shown."""
        shown = None
        for frame in self._container.decode(self._stream):
            coded = self._square_size(frame)
            # Of the first frame: one whose side data was read waits for the garbage collector.
            shown = shown or Orientation.from_frame(frame)
            size = Size(*coded[::-1]) if shown.transposed else Size(*coded)
            yield TimedFrame(frame.time, None, size, partial(self._read, frame, coded, shown))

    def _square_size(self, frame: Any) -> tuple[int, int]:
        ratio = Fraction(self._stream.sample_aspect_ratio or 0) or Fraction(1)
        width = max(1, round(frame.width * ratio)) if ratio > 0 else frame.width
        check_pixels(self._path, width, frame.height)
        return width, frame.height

    def _read(self, frame: Any, size: tuple[int, int], orientation: Orientation) -> np.ndarray:
        codec = self._stream.codec_context
        transfer, primaries = int(codec.color_trc or 0), int(codec.color_primaries or 0)
        return orientation.apply(self._converter.to_rgb(frame, size, transfer, primaries))


@contextmanager
def open_film(path: str | Path) -> Iterator[Film]:
    """Open the film of a video file. Raises UsageError if it has none, and PyAV's errors."""
    with open_container(path) as container:
        yield Film(path, container)


def choose_stream(path: str | Path, container: Any) -> Any:
    """Return the video stream that players show: no cover, and the largest of the default ones."""

    def rank(stream: Any) -> tuple[bool, bool, int]:
        codec = stream.codec_context
        default = bool(_disposition(stream) & DEFAULT)
        return codec.name not in PICTURE_CODECS, default, codec.width * codec.height

    films = [s for s in container.streams.video if not _disposition(s) & ATTACHED_PICTURE]
    if not films:
        raise UsageError(f"{path} has no video stream.", "Give a video file.")
    known = [stream for stream in films if stream.codec_context is not None]
    if not known:
        raise UsageError(f"{path} has an unknown codec.", "Convert it to H.264.")
    return max(known, key=rank)


def _disposition(stream: Any) -> int:
    found = getattr(stream, "disposition", 0)
    return int(getattr(found, "value", found))  # an enumeration in some versions of PyAV
