"""Pillow images as sRGB, upright, 8 bits: colour profiles, deep greys, transparency."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size

if TYPE_CHECKING:
    import numpy as np

#: Tags of Exif and TIFF.
ORIENTATION, WIDTH, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 0x0112, 256, 258, 262, 339
WHITE_IS_ZERO, SIGNED = 0, 2


def upright(image: Any) -> Any:
    """Load an image, turn it in place as its file says, and return it."""
    from PIL import ImageOps

    image.load()  # Pillow turns TIFFs here, and removes the tag
    ImageOps.exif_transpose(image, in_place=True)
    return image


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
    scaled = values.astype(np.float32) * (255 / white)
    grey: np.ndarray = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
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
