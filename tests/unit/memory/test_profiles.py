"""Amounts of memory as users write them, and budgets of devices."""

from __future__ import annotations

import pytest

from mlx_sora.errors import UsageError
from mlx_sora.memory.profiles import PROFILES, format_bytes, parse_bytes, profile_budget


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("3.3GB", 3_300_000_000),
        ("3.3 gb", 3_300_000_000),
        ("8G", 8_000_000_000),
        ("800MB", 800_000_000),
        ("2GiB", 2 << 30),
        ("512Mi", 512 << 20),
        ("1000", 1000),
        ("12 KB", 12_000),
    ],
)
def test_parse_accepts_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0GB", "3,3GB", "1TB", "1GBB", "nan", "1e9", "I"]
)
def test_parse_refuses_other_texts(text: str) -> None:
    with pytest.raises(UsageError, match=r"3\.3GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "1 B"),
        (500, "500 B"),
        (1500, "2 kB"),
        (1_000_001, "2 MB"),
        (812_000_000, "812 MB"),
        (812_000_001, "813 MB"),
        (3_300_000_001, "3.31 GB"),
    ],
)
def test_format_rounds_up(count: int, text: str) -> None:
    assert format_bytes(count) == text
    assert parse_bytes(text) >= count


def test_profiles() -> None:
    assert profile_budget("iphone-15-pro") == 3_300_000_000
    for name, count in PROFILES.items():
        kind, size = name.split("-")[:2]
        share = count / (int(size.removesuffix("gb")) << 30) if kind in ("mac", "ipad") else 0.7
        assert 0.6 < share < 0.8 or name == "ipad-8gb"


@pytest.mark.parametrize("size", [64, 96, 128, 192, 256, 512])
def test_large_macs_allow_three_quarters(size: int) -> None:
    assert profile_budget(f"mac-{size}gb") == size * (3 << 28)
    with pytest.raises(UsageError, match="mac-16gb"):
        profile_budget("mac-16")
