"""Pictures and videos that a program passes as pixels: PIL images, arrays, and `Video`s."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

#: Beginning of the names of pixels in records, where a file has its path.
PIXELS_PREFIX = "memory:"

#: Digits of a checksum in such a name.
_DIGITS = 16


class Pixels(str):
    """A picture or video in memory. As text, its name in records: PIXELS_PREFIX and a checksum.

    frames: uint8 [F, H, W, 3], or None. image: instead of them a PIL image, which `video.reader`
    converts to sRGB. fps: None if unknown. sha256: of the content.
    """

    frames: np.ndarray | None
    image: Any
    fps: float | None
    sha256: str

    @classmethod
    def from_value(cls, value: Any, fps: float | None = None) -> Pixels:
        """Return a copy of a PIL image, of pixels, or of a list of both. Raises UsageError.

        Pixels are [H, W, 3] or [F, H, W, 3], uint8 or floats from 0 to 1.
        """
        if is_image(value):
            value.load()
            image = value.copy()
            head = f"{image.mode} {image.size} {image.info.get('icc_profile')!r}"
            return cls._from_content(head, image.tobytes(), image=image)
        if isinstance(value, Sequence):
            value = _stack([each.convert("RGB") if is_image(each) else each for each in value])
        frames = _as_uint8(value)
        frames = frames if frames.ndim == 4 else frames[None]
        return cls._from_content(str(frames.shape), frames.tobytes(), frames=frames, fps=fps)

    @classmethod
    def _from_content(cls, head: str, content: bytes, **values: Any) -> Pixels:
        digest = hashlib.sha256(head.encode())
        digest.update(content)
        made = cls(PIXELS_PREFIX + digest.hexdigest()[:_DIGITS])
        made.sha256 = digest.hexdigest()
        made.frames, made.image, made.fps = None, None, None
        for name, each in values.items():
            setattr(made, name, each)
        return made

    @property
    def is_video(self) -> bool:
        """True for several frames."""
        return self.frames is not None and len(self.frames) > 1


def is_image(value: Any) -> bool:
    """Return True for an image of Pillow, which need not be imported for that."""
    return hasattr(type(value), "getexif") and hasattr(type(value), "convert")


def is_array(value: Any) -> bool:
    """Return True for arrays of numpy, MLX and others like them."""
    return hasattr(type(value), "shape") and hasattr(type(value), "dtype")


def is_video(value: Any) -> bool:
    """Return True for a `mlx_sora.Video`, which this layer cannot import."""
    return hasattr(type(value), "frames") and hasattr(value, "num_frames")


def is_medium(value: Any) -> bool:
    """Return True for one picture or video, False for a list of several."""
    return (
        isinstance(value, (str, os.PathLike))
        or is_image(value)
        or is_array(value)
        or is_video(value)
    )


def is_footage(value: Any) -> bool:
    """Return True for a list of pictures, which are the frames of one video."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(is_image(each) or (is_array(each) and each.ndim == 3) for each in value)
    )


def read_medium(value: Any) -> Any:
    """Return the path of a `Video` that a single file holds, `Pixels` of what is in memory.

    Paths and `Pixels` stay as they are. Raises UsageError.
    """
    if is_video(value):
        if value.path is not None and value.path.is_file():
            return value.path
        return Pixels.from_value(value.frames, value.fps)
    if is_image(value) or is_array(value) or is_footage(value):
        return Pixels.from_value(value)
    return value


def _stack(pictures: Sequence[Any]) -> np.ndarray:
    import numpy as np

    frames = [_as_uint8(picture) for picture in pictures]
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        sizes = " and ".join(f"{w}x{h}" for h, w, _ in sorted(shapes)[:2])
        raise UsageError(f"The frames of a video are {sizes}.", "Give frames of one size.")
    return np.stack(frames)


def _as_uint8(value: Any) -> np.ndarray:
    """Return a copy of pixels as uint8. Raises UsageError."""
    import numpy as np

    try:
        pixels = np.array(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"numpy cannot read the pixels: {error}.", "Pass a numpy array.") from None
    if pixels.ndim not in (3, 4) or pixels.shape[-1] != 3 or not pixels.size:
        raise UsageError(
            f"Pixels must have the shape [H, W, 3] or [F, H, W, 3], not {list(pixels.shape)}.",
            "Put red, green and blue last, and nothing else.",
        )
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating):
        raise UsageError(
            f"Pixels must be uint8, or floats from 0 to 1, not {pixels.dtype}.",
            'If they are 0 to 255: pixels.astype("uint8").',
        )
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):
        raise UsageError(
            f"Pixels that are floats must lie from 0 to 1; these are {low:g} to {high:g}.",
            'If they are 0 to 255: pixels.astype("uint8").',
        )
    found: np.ndarray = np.rint(pixels.astype(np.float32) * 255).astype(np.uint8)
    return found
