"""Pictures as upright sRGB of 8 bits, and animations, which are videos; Pillow reads both.

Colour profiles, orientation, deep greys and transparency are applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size
from mlx_sora.video.containers import MAX_PACKETS, check_pixels, jpeg_command, open_image
from mlx_sora.video.metadata import recorded_timing
from mlx_sora.video.timing import TimedFrame

if TYPE_CHECKING:
    import numpy as np

#: Tags of Exif and TIFF.
ORIENTATION, WIDTH, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 0x0112, 256, 258, 262, 339
DNG_VERSION, SUBFILE_TYPE = 50706, 254
WHITE_IS_ZERO, SIGNED = 0, 2

#: Pillow's names of formats whose further images are frames.
ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")

#: Browsers show frames without a duration, and GIF frames of at most 10 ms, for 100 ms.
SHORTEST, DEFAULT_DURATION = {"GIF": 10}, 100

#: Rate of an animation of a single long frame that does not say how many frames it stands for.
DEFAULT_FPS = 24.0


def upright(image: Any) -> Any:
    """Load an image, turn it in place as its file says, and return it."""
    from PIL import ImageOps

    image.load()  # Pillow turns TIFFs here, and removes the tag
    ImageOps.exif_transpose(image, in_place=True)
    return image


def check_developed(image: Any, path: str | Path) -> None:
    """Raise UsageError for a raw photograph, of which Pillow would read the thumbnail."""
    tags = getattr(image, "tag_v2", {})
    if DNG_VERSION in tags or tags.get(SUBFILE_TYPE, 0) & 1:
        raise UsageError(
            f"{path} is a raw photograph.", f"Convert it, on macOS: {jpeg_command(path)}"
        )


def upright_size(image: Any) -> Size:
    """Return the size of an image as it is shown, from its header."""
    turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    tags = getattr(image, "tag_v2", {})
    if image.format == "TIFF" and tags.get(WIDTH) != image.width:
        turned = False  # Pillow 11 and later exchange the sides when they open it
    width, height = image.size
    return Size(height, width) if turned else Size(width, height)


def to_srgb(image: Any, path: Path) -> Any:
    """Convert a loaded image to mode RGB in sRGB. Transparency is put on black."""
    from PIL import Image

    profile, alpha = image.info.get("icc_profile"), None
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(deep_grey(image, path))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("RGB")
    elif image.mode in ("P", "1"):
        image = image.convert("RGB")
    image = _apply_profile(image, profile)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size), alpha)
    return image


def deep_grey(image: Any, path: Path) -> np.ndarray:
    """Return greys of 12 to 32 bits, or of floating point from 0 to 1, as uint8 [H, W]."""
    import numpy as np

    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):
            raise UsageError(
                f"{path} holds floating-point pixels outside 0 to 1, whose range is unknown.",
                "Save it as 8-bit PNG.",
            )
        white = 1.0
    else:
        bits = int(tags.get(BITS, (16,))[0])
        signed = bool(tags) and tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
        if bits == 32 and not signed:
            values = values.astype(np.int32).view(np.uint32)
        if bits == 32 and values.max() <= 0xFFFF:
            bits, signed = 16, False  # 16 bits that were stored in 32
        white = float(2 ** (bits - signed) - 1)
    scaled = values.astype(np.float32)
    scaled *= 255 / white
    grey: np.ndarray = np.rint(scaled.clip(0, 255, out=scaled), out=scaled).astype(np.uint8)
    return 255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey


def _apply_profile(image: Any, profile: bytes | None) -> Any:
    """Convert from an embedded colour profile; as browsers do, ignore one that does not fit."""
    import io

    from PIL import ImageCms

    if profile is not None or image.mode == "LAB":
        with suppress(OSError, ValueError, ImageCms.PyCMSError):
            srgb: Any = ImageCms.createProfile("sRGB")
            source: Any = (
                ImageCms.createProfile("LAB")
                if profile is None
                else ImageCms.ImageCmsProfile(io.BytesIO(profile))
            )
            return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


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
            check_pixels(self._path, *image.size)  # a frame of a GIF can enlarge the others
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
    if image.format not in ANIMATIONS:
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
