"""Memory budgets: those of common devices, and amounts as users write them."""

from __future__ import annotations

import re

from mlx_sora.errors import UsageError

_GIB = 1 << 30

#: Bytes that one application may use, by device.
PROFILES: dict[str, int] = {
    # Of 8 GB: On-device Sora, arXiv 2502.04363.
    "iphone-15-pro": 3_300_000_000,
    # With the entitlement for increased memory: 3 of 8 GB since iPadOS 26.4, where it was 6
    # (developer.apple.com/forums/thread/826325); 12 of 16 GB (MacRumors, 17 September 2021), of
    # which no later figure is known.
    "ipad-8gb": 3_000_000_000,
    "ipad-16gb": 12_000_000_000,
    # Metal's recommendedMaxWorkingSetSize, two thirds of the memory: 10922.67 MiB of 16 GB,
    # 21845.34 of 32 (ollama issue 434); 8 and 24 GB by the same rule.
    "mac-8gb": 8 * _GIB * 2 // 3,
    "mac-16gb": 16 * _GIB * 2 // 3,
    "mac-24gb": 24 * _GIB * 2 // 3,
    "mac-32gb": 32 * _GIB * 2 // 3,
    # Above 36 GB three quarters: 49152.00 MiB of 64 GB (llama.cpp issue 1870). macOS 26 allows
    # more on the largest, such as 107.52 GiB of 128 (antirez/ds4 pull request 893).
    **{f"mac-{size}gb": size * _GIB * 3 // 4 for size in (64, 96, 128, 192, 256, 512)},
}

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_UNITS |= {"KI": 1 << 10, "MI": 1 << 20, "GI": _GIB}


def profile_budget(name: str) -> int:
    """Return the bytes of a device in PROFILES. Raises UsageError for other names."""
    if name not in PROFILES:
        raise UsageError(
            f"Unknown device profile {name!r}.", f"Choose one of: {', '.join(PROFILES)}."
        )
    return PROFILES[name]


def parse_bytes(text: str) -> int:
    """Parse `3.3GB`, `800 MiB` or `2000000000`; GB is 10^9, GiB 2^30. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*((?:[KMG]I?)?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{text!r} is not an amount of memory.", "Write it as 3.3GB or 800MB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(count: int) -> str:
    """Format as `3.30 GB`, `812 MB` or less, rounded up so that the shown number suffices."""
    if count >= 10**9:
        return f"{-(-count // 10**7) / 100:.2f} GB"
    unit, size = ("MB", 10**6) if count >= 10**6 else ("kB", 10**3) if count >= 10**3 else ("B", 1)
    return f"{-(-count // size)} {unit}"
