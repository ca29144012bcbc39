"""Images and videos, read as uint8 RGB, upright, and resized as in Open-Sora 1.2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size
from mlx_sora.request.options import ImageReference, VideoReference
from mlx_sora.request.pixels import PIXELS_PREFIX, Pixels
from mlx_sora.utils.files import check_file
from mlx_sora.video.containers import (
    MAX_PACKETS,
    MAX_PIXELS,
    is_picture,
    open_image,
    read_errors,
)
from mlx_sora.video.films import Film, open_film
from mlx_sora.video.output_path import frame_path, is_sequence
from mlx_sora.video.pictures import (
    Animation,
    check_developed,
    is_animation,
    open_animation,
    to_srgb,
    upright,
    upright_size,
)
from mlx_sora.video.timing import Timing

if TYPE_CHECKING:
    import numpy as np

#: Advice for a file that cannot be read.
DAMAGED = "Is it an image or video, and whole?"

#: Largest ratio of the pixels of a scaled image to those it is cropped to.
MAX_CROP_RATIO = 32


@dataclass(frozen=True)
class Footage:
    """Frames uint8 [F, H, W, 3] and frames per second."""

    frames: np.ndarray
    fps: float


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video as shown: upright size, number of frames, frames per second.

    fps: 0 if the video is in memory and does not say. timing: which decoded frames these are.
    notes, warnings: for the user, about rate and colours.
    """

    size: Size
    num_frames: int
    fps: float
    timing: Timing
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


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
    """Return True if the content of a file is a video or an animation. Raises UsageError."""
    if isinstance(path, Pixels):
        return path.is_video
    _check_file(path)
    if is_picture(path):
        with _open_image(path) as image:
            return is_animation(image)
    with _open_video(path):
        return True


def image_size(path: str | Path) -> Size:
    """Read the upright size of an image from its header. Raises UsageError."""
    if isinstance(path, Pixels):
        return Size(*_image_in_memory(path).size)
    with _open_image(path) as image:
        return upright_size(image)


def probe_medium(path: str | Path, default_fps: float) -> tuple[Size, int, float, VideoInfo | None]:
    """Return size, frames and rate of a video or image, and more of a video. Raises UsageError."""
    if not is_video(path):
        return image_size(path), 1, default_fps, None
    info = probe_video(path)
    return info.size, info.num_frames, round(info.fps or default_fps, 3), info


def read_image(path: str | Path, size: Size | None = None) -> np.ndarray:
    """Read an image as uint8 [H, W, 3] in sRGB, scaled and cropped to `size` if it is given.

    Applies the orientation; puts transparency on black; converts deep greys to 8 bits. Large
    photographs are decoded at a fraction of their size that is at least twice `size`. Raises
    UsageError for a file that is missing, damaged or not an image.
    """
    import numpy as np

    picture: Any
    if isinstance(path, Pixels):
        picture = _image_in_memory(path)
    else:
        with _open_image(path) as image:
            if size is not None and image.width * image.height > MAX_PIXELS:
                image.draft(image.mode, (2 * max(size), 2 * max(size)))
            picture = to_srgb(upright(image), Path(path))
    if size is not None:
        picture = _resize_crop_image(picture, ResizeCrop.from_sizes(Size(*picture.size), size))
    pixels: np.ndarray = np.array(picture)
    return pixels


def probe_video(path: str | Path) -> VideoInfo:
    """Decode a video or animation, and return its size, rate and number of frames.

    Raises UsageError for a file that is missing, damaged, not a video or without frames.
    """
    if isinstance(path, Pixels):
        return _pixels_info(path)
    starts: list[float | None] = []
    last, size = None, None
    with _open_video(path) as video, read_errors(path, DAMAGED):
        for frame in video.frames():
            if frame.size != (size or frame.size):
                raise UsageError(f"{path} has frames of several sizes.", "Use one size.")
            size, last = frame.size, frame.duration
            starts.append(frame.start)
            if len(starts) > MAX_PACKETS:
                raise UsageError(f"{path} has over {MAX_PACKETS} frames.", "Cut it.")
        warnings = video.warnings
    if size is None:
        raise UsageError(f"{path} holds no frames.", "Give a video with at least one.")
    timing = Timing.from_starts(starts, last, video.rate, recorded=video.recorded)
    frames = timing.num_frames(len(starts))
    if not 0 < frames <= MAX_PACKETS:
        raise UsageError(f"{path} has {frames} frames at {timing.fps:g} fps.", "Cut it.")
    note = f"{path}: variable frame rate, read as {frames} frames at {timing.fps:.4g} fps."
    notes = (note,) if timing.repeats else ()
    return VideoInfo(size, frames, timing.fps, timing, notes, warnings)


def read_video(
    path: str | Path,
    max_frames: int | None = None,
    *,
    start: int = 0,
    size: Size | None = None,
    info: VideoInfo | None = None,
) -> Footage:
    """Read frames `start` to `start + max_frames` of a video, or to its end.

    Each frame is scaled and cropped to `size` as soon as it is decoded. info: of `probe_video`, if
    it is known. Raises UsageError as `probe_video` does, and if the range has no frames.
    """
    import numpy as np

    info = info or probe_video(path)
    stop = None if max_frames is None else start + max_frames
    frames = list(video_frames(path, info, start=start, stop=stop, size=size))
    if not frames:
        raise UsageError(
            f"{path} has {info.num_frames} frames, none from number {start} on.",
            "Select existing frames.",
        )
    return Footage(np.stack(frames), info.fps)


def read_frames(path: Path, num_frames: int) -> np.ndarray:
    """Read what a run wrote, also a sequence of png files: uint8 [F, H, W, 3]. Raises UsageError.

    num_frames: length of the video.
    """
    import numpy as np

    if is_sequence(path):
        return np.stack([read_image(frame_path(path, index)) for index in range(num_frames)])
    found = read_video(path).frames if is_video(path) else read_image(path)[None]
    if len(found) == num_frames:
        return found
    # Equal frames of an animation are one, and without a record its rate is not known.
    return found[np.arange(num_frames) * len(found) // num_frames]


def video_frames(
    path: str | Path,
    info: VideoInfo,
    *,
    start: int = 0,
    stop: int | None = None,
    size: Size | None = None,
) -> Iterator[np.ndarray]:
    """Yield frames `start` to `stop` of a video, uint8 [H, W, 3], one at a time.

    Each is scaled and cropped to `size`. info: of `probe_video`. Raises UsageError.
    """
    if isinstance(path, Pixels):
        assert path.frames is not None, "a picture is no video"
        for frame in path.frames[start:stop]:
            yield frame if size is None else resize_and_crop(frame[None], size)[0]
        return
    pixels, shown = None, None
    with _open_video(path) as video, read_errors(path, DAMAGED):
        for frame in islice(info.timing.resample(video.frames()), start, stop):
            if frame is not shown or pixels is None:
                shown, pixels = frame, frame.read()
                pixels = pixels if size is None else resize_and_crop(pixels[None], size)[0]
            yield pixels


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


@contextmanager
def _open_image(path: str | Path) -> Iterator[Any]:
    """Open an image. Errors inside the block become UsageErrors, too."""
    _check_file(path)
    with read_errors(path, DAMAGED), open_image(path) as image:
        check_developed(image, path)
        yield image


@contextmanager
def _open_video(path: str | Path) -> Iterator[Film | Animation]:
    _check_file(path)
    opener = open_animation if is_picture(path) else open_film
    with read_errors(path, DAMAGED), opener(path) as video:
        yield video


def _image_in_memory(pixels: Pixels) -> Any:
    """Return the picture as a Pillow image in sRGB."""
    from PIL import Image

    if pixels.frames is not None:
        return Image.fromarray(pixels.frames[0])
    with read_errors(pixels, "Convert it to RGB."):
        return to_srgb(upright(pixels.image.copy()), Path(pixels))


def _pixels_info(pixels: Pixels) -> VideoInfo:
    assert pixels.frames is not None, "a picture is no video"
    count, height, width, _ = pixels.frames.shape
    return VideoInfo(Size(width, height), count, pixels.fps or 0, Timing(pixels.fps or 1))


def check_media_files(*references: ImageReference | VideoReference) -> None:
    """Raise UsageError for a file that is not there."""
    for reference in references:
        _check_file(reference.path)


def _check_file(path: str | Path) -> None:
    if str(path).startswith(PIXELS_PREFIX):
        raise UsageError(f"{path} stands for pixels in memory.", "Pass the same pixels again.")
    check_file(Path(path), "Give the path of an image or a video.")
