"""Animated GIF, PNG, WebP and AVIF files, which are videos. Pillow reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size
from mlx_sora.video.containers import MAX_PACKETS, check_pixels, open_image
from mlx_sora.video.metadata import recorded_timing
from mlx_sora.video.pictures import to_srgb, upright
from mlx_sora.video.timing import TimedFrame

if TYPE_CHECKING:
    import numpy as np

#: Pillow's names of formats whose further images are frames.
FORMATS = ("GIF", "PNG", "WEBP", "AVIF")

#: Browsers show frames without a duration, and GIF frames of at most 10 ms, for 100 ms.
SHORTEST, DEFAULT_DURATION = {"GIF": 10}, 100

#: Rate of an animation of a single long frame that does not say how many frames it stands for.
DEFAULT_FPS = 24.0


class Animation:
    """The frames of an open Pillow image.

    recorded: rate at which mlx_sora wrote it, None if there is no record.
    """

    rate: float | None = None
    warnings: tuple[str, ...] = ()

    def __init__(self, path: str | Path, image: Any) -> None:
        check_pixels(path, *image.size)
        self._path, self._image = path, image
        timing = recorded_timing(image)
        self._num_frames = None if timing is None else timing[1]
        single = DEFAULT_FPS if count_frames(image) == 1 else None
        self.recorded: float | None = single if timing is None else timing[0]

    def frames(self) -> Iterator[TimedFrame]:
        """Decode the frames."""
        image, start = self._image, 0.0
        count = count_frames(image)
        if count > MAX_PACKETS:
            raise UsageError(f"{self._path} has over {MAX_PACKETS} frames.", "Cut it.")
        for index in range(int(getattr(image, "default_image", False)), count):
            image.seek(index)
            image.load()
            frame = upright(image.copy())
            if count == 1 and self._num_frames and self.recorded:
                seconds = self._num_frames / self.recorded
            else:
                seconds = _duration(image) / 1000
            yield TimedFrame(start, seconds, Size(*frame.size), partial(_pixels, frame, self._path))
            start += seconds


@contextmanager
def open_animation(path: str | Path) -> Iterator[Animation]:
    """Open an animated image. Raises UsageError for a still one, and Pillow's errors."""
    with open_image(path) as image:
        if not is_animation(image):
            raise UsageError(f"{path} is an image.", "Give a video.")
        yield Animation(path, image)


def is_animation(image: Any) -> bool:
    """Return True if a Pillow image stands for more than one frame.

    Equal frames are written as one: a GIF or WebP of a single frame can be a recorded video.
    """
    if image.format not in FORMATS:
        return False
    if count_frames(image) - int(getattr(image, "default_image", False)) > 1:
        return True
    if image.format == "GIF" and {"loop", "duration"} <= set(image.info):
        return _duration(image) > DEFAULT_DURATION
    timing = recorded_timing(image) if image.format in ("GIF", "WEBP") else None
    return timing is not None and timing[1] > 1


def count_frames(image: Any) -> int:
    """Return the number of images in a Pillow image."""
    return int(getattr(image, "n_frames", 1))


def _duration(image: Any) -> float:
    milliseconds = float(image.info.get("duration") or 0)
    shortest = SHORTEST.get(image.format, 0)
    return milliseconds if milliseconds > shortest else DEFAULT_DURATION


def _pixels(image: Any, path: str | Path) -> np.ndarray:
    import numpy as np

    return np.array(to_srgb(image, Path(path)))
