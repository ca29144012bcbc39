"""Checks for obstacles under the name of a file that is to be written, before the work."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from mlx_sora.errors import UsageError
from mlx_sora.utils.files import os_error_fix

#: Bytes that must fit on the disk before the work; many disks accept an empty file when full.
_PROBE = bytes(4096)


def is_special(path: Path) -> bool:
    """Return True for pipes, sockets and devices."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def refuse_obstacle(path: Path) -> None:
    """Raise UsageError for a folder, pipe, device or broken link under the name of a file."""
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder.", "Remove it, or change --output.")
    if is_special(path):
        raise UsageError(
            f"{path} is a pipe or a device, and the output is written to a file.",
            "Change --output.",
        )
    refuse_broken_link(path)


def refuse_broken_link(path: Path) -> None:
    """Raise UsageError for a link to what does not exist."""
    if path.is_symlink() and not path.exists():
        raise UsageError(
            f"{path} is a link to {os.readlink(path)}, which does not exist.",
            "Remove the link, or change --output.",
        )


def check_result_file(path: Path, *, overwrite: bool = True) -> None:
    """Raise UsageError unless a file can be written with the folders it needs.

    overwrite: it may replace another one.
    """
    refuse_obstacle(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already.", "Give --overwrite or another --output.")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raise UsageError unless a file can be written in `folder`, which is made if it is missing."""
    found = existing_folder(folder)
    refuse_broken_link(found)
    if not found.is_dir():
        raise UsageError(f"{found} is not a folder.", "Change --output.")
    check_writable(found)


def existing_folder(folder: Path) -> Path:
    """Return `folder`, or the first thing above it that exists."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def check_writable(folder: Path) -> None:
    """Raise UsageError unless a file can be written in `folder`. Leaves none."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(_PROBE)
    except OSError as error:
        fix = os_error_fix(error, "Change --output.")
        raise UsageError(f"Cannot write into {folder}: {error.strerror}.", fix) from None
