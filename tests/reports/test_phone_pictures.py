"""Photographs of phones: orientation, many megapixels, HEIC; and names that are wrong.

python-pillow/Pillow 7381 and 2806, baserow/baserow 3013, strukturag/libheif 111.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, features

from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size
from mlx_sora.video import containers
from mlx_sora.video.reader import image_size, read_image

#: The corner that is at the top left of the stored picture, by orientation.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1)}
FORMATS = [".jpg", ".png", ".webp", ".tiff", *[".avif"] * features.check("avif")]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("orientation", [*CORNERS, 8])
def test_every_format_is_turned_once(tmp_path: Path, suffix: str, orientation: int) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    shown = Size(16, 32) if orientation >= 5 else Size(32, 16)
    assert image_size(path) == shown
    found = read_image(path)
    assert found.shape == (shown.height, shown.width, 3)
    row, column = CORNERS.get(orientation, (-1, 0))
    assert found[row, column].min() > 200
    assert (found > 128).mean() == pytest.approx(1 / 8, abs=0.02)


def test_large_photographs_are_decoded_at_a_fraction(tmp_path: Path) -> None:
    image = Image.new("RGB", (8064, 6048), (90, 120, 200))
    image.paste((250, 250, 250), (0, 0, 4032, 6048))
    image.save(tmp_path / "a.jpg", quality=60)
    assert image_size(tmp_path / "a.jpg") == Size(8064, 6048)
    found = read_image(tmp_path / "a.jpg", Size(64, 48)).astype(int)
    assert np.abs(found[:, 40:] - (90, 120, 200)).max() <= 4
    assert np.abs(found[:, :24] - 250).max() <= 4


def test_memory_bounds_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (400, 300)).save(tmp_path / "a.png")
    monkeypatch.setattr(containers, "MAX_IMAGE_BYTES", 400 * 300 * 12 - 1)
    with pytest.raises(UsageError, match=r"a.png has 400x300 pixels.*memory"):
        read_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 300 // 3)
    with pytest.raises(UsageError, match=r"a.png has too many pixels"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"heix"])
@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
def test_heic_without_its_package_says_what_to_do(
    tmp_path: Path, brand: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    head = struct.pack(">I4s4sI4s", 20, b"ftyp", brand, 0, b"mif1")
    (tmp_path / name).write_bytes(head + bytes(200))
    for read in (read_image, image_size):
        with pytest.raises(UsageError, match=r"mlx-sora\[heic\].*sips -s format jpeg") as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


def test_heic_is_read_with_its_package(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = np.full((16, 32, 3), (200, 60, 60), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    heif = pillow_heif.from_pillow(Image.fromarray(pixels))
    heif.save(tmp_path / "a.jpg", quality=90, exif=exif.tobytes())
    assert image_size(tmp_path / "a.jpg") == Size(16, 32)
    found = read_image(tmp_path / "a.jpg").astype(int)
    assert found[1, -2].min() > 240
    assert np.abs(found[20:, 5] - (200, 60, 60)).max() <= 8


@pytest.mark.parametrize(("tag", "value"), [(50706, b"\1\4\0\0"), (254, 1)])
def test_a_raw_photograph_is_not_its_thumbnail(tmp_path: Path, tag: int, value: object) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[tag] = 1 if isinstance(value, bytes) else 4
    tags[tag] = value
    Image.new("RGB", (8, 8)).save(tmp_path / "a.dng", "TIFF", tiffinfo=tags)
    with pytest.raises(UsageError, match=r"a.dng is a raw photograph.* sips -s format jpeg"):
        read_image(tmp_path / "a.dng")


def test_a_jpeg_named_heic_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (90, 120, 200)).save(tmp_path / "a.heic", "JPEG", quality=95)
    assert np.abs(read_image(tmp_path / "a.heic").astype(int) - (90, 120, 200)).max() <= 3
