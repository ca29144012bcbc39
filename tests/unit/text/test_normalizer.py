"""Damaged tables; right ones are held to the reference by the parity tests and tests/reports."""

from __future__ import annotations

import struct

import pytest

from mlx_sora.text.normalizer import Normalizer, grapheme_clusters
from tests.helpers.tokenizer_model import spiece_model


def model(table: bytes) -> bytes:
    """The fields of a model that hold the table."""
    inner = b"\x12" + bytes([len(table)]) + table
    return b"\x1a" + bytes([len(inner)]) + inner


def test_a_model_without_a_table_changes_nothing() -> None:
    for proto in (b"", model(b""), b"\x08\x01\x0d\0\0\0\0\x09\0\0\0\0\0\0\0\0"):
        assert Normalizer(proto).normalize("e\u0301 \ufb01") == "e\u0301 \ufb01"


def test_a_table_that_points_outside_changes_nothing() -> None:
    units = struct.pack("<II", (1 << 31) - 1, 97)
    assert Normalizer(model(struct.pack("<I", 8) + units)).normalize("a\u0301z") == "a\u0301z"


def test_ascii_takes_a_table_with_the_same_result(request: pytest.FixtureRequest) -> None:
    path = spiece_model(request.config.getoption("--golden"))
    normalizer = Normalizer(path.read_bytes())
    text = "".join(map(chr, range(128))) + "a\r\nb\n\rc"
    clusters = map(normalizer._replace, grapheme_clusters(text))
    assert normalizer.normalize(text) == "".join(clusters) != text


@pytest.mark.parametrize(
    "proto",
    [model(struct.pack("<I", 400) + b"abcd"), model(b"\x05\0\0\0abcdefg"), b"\x1a\xff", b"\x1f"],
)
def test_damaged_tables(proto: bytes) -> None:
    with pytest.raises(ValueError, match="table|number|field"):
        Normalizer(proto)
