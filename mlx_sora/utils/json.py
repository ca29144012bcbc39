"""Reading of untrusted JSON: bounded size, UTF-8, unique keys."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from mlx_sora.errors import shell_words

#: Largest JSON file in bytes. Parsed, it can take 30 times as much memory.
MAX_JSON = 8_000_000


#: Start of the small text that stands for a file where Git LFS has not fetched it.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def lfs_command(path: Path) -> str:
    """Return the command that fetches a file that Git LFS left as a pointer."""
    return shell_words("git", "-C", path.parent, "lfs", "pull")


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises OSError, also for pipes and devices, which may never end; ValueError above `limit` and
    for a Git LFS pointer.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if data.startswith(LFS_POINTER):
        raise ValueError(f"it is a Git LFS pointer, not the file ({lfs_command(path)} fetches it)")
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit / 1e6:g} MB")
    return data


def read_object(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Return the JSON object in a file. Raises OSError, and ValueError that says what is wrong."""
    return parse_object(read_bytes(path, limit))


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError that says what is wrong."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers disagree about which of the two counts
        raise ValueError("it has the same key twice")
    return found


def as_number(value: object) -> float:
    """Return a finite JSON number that a float holds. Raises ValueError for any other value."""
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int and abs(value) <= 1 << 53:
        return float(value)
    raise ValueError("no number")
