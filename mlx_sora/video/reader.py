"""Images and videos, read as uint8 RGB, upright, and resized as in Open-Sora 1.2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size
from mlx_sora.video.containers import (
    MAX_PACKETS,
    MAX_PIXELS,
    check_pixels,
    open_container,
    open_image,
    read_errors,
)

if TYPE_CHECKING:
    import numpy as np

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif")

#: Advice for a file that cannot be read.
DAMAGED = "Is it an image or video, and whole?"

#: Largest ratio of the pixels of a scaled image to those it is cropped to.
MAX_CROP_RATIO = 32

#: Intervals between frames may differ from the median by this share.
JITTER = 0.5


@dataclass(frozen=True)
class Footage:
    """Frames uint8 [F, H, W, 3] and frames per second."""

    frames: np.ndarray
    fps: float


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video as shown: upright size, number of frames, frames per second."""

    size: Size
    num_frames: int
    fps: float


@dataclass(frozen=True)
class ResizeCrop:
    """Resize of an image to fill a size: scaled, then cropped to `size` at the centre."""

    source: Size
    scaled: Size
    size: Size

    @classmethod
    def from_sizes(cls, source: Size, size: Size) -> ResizeCrop:
        """Scale by the factor that just covers `size`; mirrors ResizeCrop of Open-Sora 1.2."""
        across, down = size.width / source.width, size.height / source.height
        if down > across:
            scaled = Size(round(source.width * down), size.height)
        else:
            scaled = Size(size.width, round(source.height * across))
        if scaled.width * scaled.height > MAX_CROP_RATIO * size.width * size.height:
            raise UsageError(f"{source} is too long and thin to fill {size}.", "Cut it first.")
        return cls(source, scaled, size)

    def __str__(self) -> str:
        """Describe the steps, such as "400x300, scaled to 320x240, cropped to 320x180"."""
        parts = [str(self.source)]
        if self.scaled != self.source:
            parts.append(f"scaled to {self.scaled}")
        if self.size != self.scaled:
            parts.append(f"cropped to {self.size}")
        return ", ".join(parts) if len(parts) > 1 else f"{self.source}, as it is"


def is_video(path: str | Path) -> bool:
    """Return True if the suffix is that of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def image_size(path: str | Path) -> Size:
    """Read the upright size of an image from its header. Raises UsageError."""
    with _open_image(path) as image:
        rotated = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        width, height = image.size
    return Size(height, width) if rotated else Size(width, height)


def read_image(path: str | Path, size: Size | None = None) -> np.ndarray:
    """Read an image as uint8 [H, W, 3], scaled and cropped to `size` if it is given.

    Applies the EXIF orientation; puts transparency on black; converts 16 bits to 8. Raises
    UsageError for a file that is missing, damaged or not an image.
    """
    import numpy as np
    from PIL import ImageOps

    with _open_image(path) as image:
        picture: Any = _to_rgb(ImageOps.exif_transpose(image), Path(path))
    if size is not None:
        picture = _resize_crop_image(picture, ResizeCrop.from_sizes(Size(*picture.size), size))
    pixels: np.ndarray = np.array(picture)
    return pixels


def probe_video(path: str | Path) -> VideoInfo:
    """Read size, frames and rate of a video from its index.

    Raises UsageError for a file that is missing, damaged, not a video or without frames, and for a
    variable frame rate.
    """
    with _open_video(path) as (container, stream):
        with read_errors(path, DAMAGED):
            packets = islice(container.demux(stream), MAX_PACKETS + 1)
            stamps = sorted(p.pts for p in packets if p.pts is not None and p.size)
            unit = float(stream.time_base or 1)
        context = stream.codec_context
        size, rate = Size(context.width, context.height), stream.average_rate
    if len(stamps) >= MAX_PACKETS:
        raise UsageError(f"{path} has over {MAX_PACKETS} frames.", "Cut it.")
    if not stamps or min(size) < 1:
        raise UsageError(f"{path} holds no frames.", "Give a video with at least one.")
    if len(stamps) > 1:
        rate = _constant_rate(path, [(b - a) * unit for a, b in pairwise(stamps)])
    first = next(_decode_frames(path))
    return VideoInfo(Size(first.shape[1], first.shape[0]), len(stamps), float(rate or 1))


def read_video(
    path: str | Path, max_frames: int | None = None, *, start: int = 0, size: Size | None = None
) -> Footage:
    """Read frames `start` to `start + max_frames` of a video, or to its end.

    Each frame is scaled and cropped to `size` as soon as it is decoded. Raises UsageError as
    `probe_video` does, and if the range has no frames.
    """
    import numpy as np

    info = probe_video(path)
    stop = None if max_frames is None else start + max_frames
    selected = islice(_decode_frames(path), start, stop)
    frames = [f if size is None else resize_and_crop(f[None], size)[0] for f in selected]
    if not frames:
        raise UsageError(
            f"{path} has {info.num_frames} frames, none from number {start} on.",
            "Select existing frames.",
        )
    return Footage(np.stack(frames), info.fps)


def resize_and_crop(frames: np.ndarray, size: Size) -> np.ndarray:
    """Scale and crop frames uint8 [F, H, W, 3] to `size`: [F, height, width, 3].

    Bilinear between the four nearest pixels, without smoothing, as Open-Sora resizes videos.
    """
    import numpy as np

    _, height, width, _ = frames.shape
    fit = ResizeCrop.from_sizes(Size(width, height), size)
    if fit.scaled == fit.source:
        scaled = frames
    else:
        rows = _interpolation_weights(height, fit.scaled.height)
        columns = _interpolation_weights(width, fit.scaled.width)
        scaled = np.stack([_bilinear(frame, rows, columns) for frame in frames])
    left, top = (fit.scaled.width - size.width) // 2, (fit.scaled.height - size.height) // 2
    cropped: np.ndarray = scaled[:, top : top + size.height, left : left + size.width]
    return cropped


def to_upright_rgb(frame: Any) -> np.ndarray:
    """Return the pixels of a PyAV frame, rotated as its file says."""
    import numpy as np

    pixels: Any = frame.to_ndarray(format="rgb24")
    rotated: np.ndarray = np.rot90(pixels, round(frame.rotation / 90))
    return rotated


def _interpolation_weights(length: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each of `target` pixels, its two source pixels and the weight of the second."""
    import numpy as np

    centre = (np.arange(target) + 0.5) * (length / target) - 0.5
    centre = np.maximum(centre, 0)
    low = np.minimum(centre.astype(np.int64), length - 1)
    return low, np.minimum(low + 1, length - 1), (centre - low).astype(np.float32)


def _bilinear(frame: np.ndarray, rows: Any, columns: Any) -> np.ndarray:
    import numpy as np

    (top, bottom, down), (left, right, across) = rows, columns
    down, across = down[:, None, None], across[:, None]
    lines = frame[top] * (1 - down) + frame[bottom] * down
    pixels: np.ndarray = np.rint(lines[:, left] * (1 - across) + lines[:, right] * across)
    return pixels.astype(np.uint8)


def _resize_crop_image(image: Any, fit: ResizeCrop) -> Any:
    """Scale (bicubic) and crop a Pillow image, as Open-Sora does for images."""
    from PIL import Image

    if fit.scaled != fit.source:
        image = image.resize(fit.scaled, Image.Resampling.BICUBIC)
    # The reference rounds to even here, as Python does, but not for videos.
    left = round((fit.scaled.width - fit.size.width) / 2)
    top = round((fit.scaled.height - fit.size.height) / 2)
    return image.crop((left, top, left + fit.size.width, top + fit.size.height))


def _to_rgb(image: Any, path: Path) -> Any:
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        raise UsageError(
            f"{path} holds floating-point pixels, whose range is unknown.", "Save it as 8-bit PNG."
        )
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


@contextmanager
def _open_image(path: str | Path) -> Iterator[Any]:
    """Open an image. Errors inside the block become UsageErrors, too."""
    _check_file(path)
    with read_errors(path, DAMAGED), open_image(path) as image:
        yield image


@contextmanager
def _open_video(path: str | Path) -> Iterator[tuple[Any, Any]]:
    _check_file(path)
    with read_errors(path, DAMAGED):
        container = open_container(path)
    with container:
        if not container.streams.video:
            raise UsageError(f"{path} has no video stream.", "Give a video file.")
        stream = container.streams.video[0]
        codec = stream.codec_context
        if codec is None:
            raise UsageError(f"{path} has an unknown codec.", "Convert it to H.264.")
        check_pixels(path, codec.width, codec.height)
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, stream


def _decode_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Yield upright frames. Raises UsageError for damage and for a video without frames."""
    with _open_video(path) as (container, stream), read_errors(path, DAMAGED):
        first = None
        for frame in container.decode(stream):
            pixels = to_upright_rgb(frame)
            first = pixels.shape if first is None else first
            if pixels.shape != first:
                raise UsageError(f"{path} has frames of several sizes.", "Use one size.")
            yield pixels
        if first is None:
            raise UsageError(f"{path} holds no frames.", "Give a video with at least one.")


def _constant_rate(path: str | Path, intervals: list[float]) -> float:
    median = sorted(intervals)[len(intervals) // 2]
    if median <= 0 or any(abs(each - median) > JITTER * median for each in intervals):
        shortest, longest = min(intervals), max(intervals)
        raise UsageError(
            f"{path} has a variable frame rate: its frames last {1000 * shortest:.0f} to "
            f"{1000 * longest:.0f} ms.",
            "Make the rate constant first, such as with ffmpeg -i IN -r 24 OUT.mp4.",
        )
    return len(intervals) / sum(intervals)


def _check_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise UsageError(f"No such file: {path}.", "Give the path of an image or a video.")
