"""Greys of 12 to 32 bits, in PNG and TIFF, which Pillow clips when it converts them.

python-pillow/Pillow 3011, 2574 and 1108.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_sora.video.reader import read_image

UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def write_tiff(path: Path, bits: int, kind: int, data: bytes, white_is_zero: bool = False) -> None:
    """Write two pixels."""
    entries = [
        *[(256, 2), (257, 1), (258, bits), (259, 1), (262, int(not white_is_zero)), (273, 134)],
        *[(277, 1), (278, 1), (279, len(data)), (339, kind)],
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    path.write_bytes(head + table + bytes(4) + data)


@pytest.mark.parametrize(
    ("bits", "kind", "data", "seen"),
    [
        (8, UNSIGNED, struct.pack("<2B", 0, 120), 120),
        (12, UNSIGNED, bytes([0, 7, 0x88]), 120),
        (16, UNSIGNED, struct.pack("<2H", 0, 120 * 257), 120),
        (16, SIGNED, struct.pack("<2h", -5, 15420), 120),
        (32, UNSIGNED, struct.pack("<2I", 0, 120 * 16843009), 120),
        (32, UNSIGNED, struct.pack("<2I", 0, 200 * 16843009), 200),
        (32, SIGNED, struct.pack("<2i", 0, 1 << 30), 128),
        (32, SIGNED, struct.pack("<2i", 0, 120 * 257), 120),
        (32, FLOAT, struct.pack("<2f", 0, 0.5), 128),
    ],
)
def test_greys_of_a_tiff(tmp_path: Path, bits: int, kind: int, data: bytes, seen: int) -> None:
    write_tiff(tmp_path / "a.tiff", bits, kind, data)
    found = read_image(tmp_path / "a.tiff").astype(int)
    assert found.shape == (1, 2, 3)
    assert np.abs(found - np.array([[[0], [seen]]])).max() <= 1


def test_white_is_zero(tmp_path: Path) -> None:
    for bits, layout, value in ((8, "<2B", 55), (16, "<2H", 55 * 257)):
        data = struct.pack(layout, 0, value)
        write_tiff(tmp_path / "a.tiff", bits, UNSIGNED, data, white_is_zero=True)
        assert read_image(tmp_path / "a.tiff")[0, :, 0].tolist() == [255, 200]


def test_greys_of_a_png(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")[..., 0].astype(int)
    assert np.abs(found - ramp / 257).max() <= 1
