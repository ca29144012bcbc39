"""Pictures with an embedded colour profile.

Comfy-Org/ComfyUI 11101, OpenDisplay/Home_Assistant_Integration 73.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from mlx_sora.video.reader import read_image

#: Primaries (XYZ under D50) and gamma.
PROFILES = {
    "Display P3": (
        ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)),
        2.2,
    ),
    "Adobe RGB": (
        ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)),
        2.2,
    ),
}


def icc(name: str) -> bytes:
    """A small display profile."""
    primaries, gamma = PROFILES[name]

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))

    text = b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = [(b"desc", text + bytes(-len(text) % 4)), (b"wtpt", xyz((0.9642, 1.0, 0.8249)))]
    tags += [(key, xyz(v)) for key, v in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)]
    tags += [(key, curve) for key in (b"rTRC", b"gTRC", b"bTRC")]
    table, body = struct.pack(">I", len(tags)), b""
    for key, data in tags:
        table += key + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data
    head = bytearray(128)
    struct.pack_into(
        ">I4sI4s4s4s",
        head,
        0,
        128 + len(table + body),
        b"none",
        0x2400000,
        *[b"mntr", b"RGB ", b"XYZ "],
    )
    head[36:40] = b"acsp"
    struct.pack_into(">3i", head, 68, 63190, 65536, 54061)
    return bytes(head) + table + body


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff"])
@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_become_srgb(tmp_path: Path, name: str, suffix: str, mode: str) -> None:
    profile = icc(name)
    image = Image.new("RGB", (16, 16), (200, 60, 60))
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    meant = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"))  # type: ignore[arg-type]
    assert meant is not None
    if suffix != ".jpg":
        image = image.quantize() if mode == "P" else image.convert(mode)
    lossless = {"lossless": True} if suffix == ".webp" else {}
    image.save(tmp_path / f"a{suffix}", icc_profile=profile, quality=100, **lossless)
    found = read_image(tmp_path / f"a{suffix}")[8, 8].astype(int)
    assert np.abs(found - meant.getpixel((0, 0))).max() <= 3
    assert np.abs(found - (200, 60, 60)).max() > 8


@pytest.mark.parametrize("profile", [b"no profile", icc("Adobe RGB")[:200]])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_profile_that_does_not_fit_is_ignored(tmp_path: Path, mode: str, profile: bytes) -> None:
    Image.new("RGB", (4, 4), (90, 90, 90)).convert(mode).save(
        tmp_path / "a.png", icc_profile=profile
    )
    assert np.unique(read_image(tmp_path / "a.png")).tolist() == [90]


def test_lab_is_converted(tmp_path: Path) -> None:
    Image.new("LAB", (4, 4), (128, 128, 128)).save(tmp_path / "a.tiff")
    found = read_image(tmp_path / "a.tiff")[0, 0].astype(int)
    assert np.abs(found - 119).max() <= 2
