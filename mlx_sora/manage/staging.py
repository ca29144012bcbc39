"""Staging of model folders: built in a hidden folder, then renamed, so never partial."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_sora.errors import WeightsError
from mlx_sora.utils.files import fsync
from mlx_sora.utils.leftovers import is_abandoned, owned_name

#: Bytes to keep free on the disk.
MARGIN = 64_000_000

#: Suffix of a folder that is being replaced.
_OLD = ".old"


@contextmanager
def disk_errors(root: Path, fix: str) -> Iterator[None]:
    """Raise WeightsError with `fix` for an OSError inside the block."""
    try:
        yield
    except OSError as error:
        raise WeightsError(
            f"Cannot use {error.filename or root}: {error.strerror or error}.", fix
        ) from error


@contextmanager
def folder_lock(folder: Path, action: str) -> Iterator[None]:
    """Lock `folder` against another process; the lock ends with the process.

    action: "download" or "conversion", for the message. Raises WeightsError if it is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"Another {action} into {folder} is running."
            raise WeightsError(message, "Wait for it, or end it.") from error
        yield
    finally:
        os.close(handle)


def is_free(target: Path) -> bool:
    """Return True if `target` does not exist or is an empty folder."""
    return not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir()))


def refuse_unknown_files(target: Path, known: Collection[str]) -> None:
    """Raise WeightsError if a folder to be replaced holds files that are not in `known`."""
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target).as_posix()
        if not path.is_dir() and not path.name.startswith(".") and name not in known:
            raise WeightsError(
                f"{target} cannot be replaced: it holds {name}, which is not part of the model.",
                "Move that file elsewhere.",
            )


def require_disk_space(place: Path, needed: int, action: str, fix: str) -> None:
    """Raise WeightsError unless `needed` bytes and `MARGIN` are free on the disk of `place`."""
    free = shutil.disk_usage(place).free
    if needed and needed + MARGIN > free:
        raise WeightsError(
            f"{needed / 1e9:.1f} GB must be {action}, but {place} has {free / 1e9:.1f} GB free.",
            fix,
        )


def replace_folder(staging: Path, target: Path) -> None:
    """Move the folder `staging` to `target` and remove the old one."""
    old = target.with_name(owned_name(f".{target.name}", _OLD))
    if target.exists():
        os.rename(target, old)
    os.rename(staging, target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(target: Path) -> None:
    """Undo or finish `replace_folder` where a process was killed in it."""
    for old in target.parent.glob(f".{glob.escape(target.name)}-*{_OLD}"):
        if is_abandoned(old.name):
            if is_free(target):
                os.rename(old, target)
            else:
                shutil.rmtree(old, ignore_errors=True)
