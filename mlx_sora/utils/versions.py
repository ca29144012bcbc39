"""Versions of the packages that shape a result, read without importing any of them."""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = ("mlx-sora", "mlx", "numpy", "safetensors", "av", "pillow", "sentencepiece")


def versions() -> dict[str, str]:
    """Installed version of Python and of each package that shapes a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
