"""Model folders are made in a hidden place and then renamed: they are whole, or not there."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_sora.errors import WeightsError
from mlx_sora.utils.files import fsync

#: Bytes to leave free on the disk.
MARGIN = 64_000_000


@contextmanager
def disk_errors(root: Path, fix: str) -> Iterator[None]:
    """Say what the disk refused inside, in one line with `fix`."""
    try:
        yield
    except OSError as error:
        raise WeightsError(
            f"Cannot use {error.filename or root}: {error.strerror or error}.", fix
        ) from error


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold `folder` against another `what`; the system lets go when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"Another {what} into {folder} is running."
            raise WeightsError(message, "Wait for it, or end it.") from error
        yield
    finally:
        os.close(handle)


def is_free(target: Path) -> bool:
    """Whether nothing, or an empty folder, is there."""
    return not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir()))


def refuse_unknown_files(target: Path, known: Collection[str]) -> None:
    """Raise WeightsError if a folder about to be replaced holds other files than `known`."""
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target).as_posix()
        if not path.is_dir() and not path.name.startswith(".") and name not in known:
            raise WeightsError(
                f"{target} is to be replaced, but holds {name}, which is not of the model in it.",
                "Move that file elsewhere.",
            )


def require_disk_space(place: Path, needed: int, action: str, fix: str) -> None:
    """Raise WeightsError unless `needed` bytes, and some more, are free where `place` is."""
    free = shutil.disk_usage(place).free
    if needed and needed + MARGIN > free:
        raise WeightsError(
            f"{needed / 1e9:.1f} GB are to be {action}, {place} has {free / 1e9:.1f} GB free.", fix
        )


def backup_path(target: Path) -> Path:
    """Where the folder that was in `target` waits for its successor."""
    return target.with_name(f".{target.name}.replaced")


def replace_folder(staging: Path, target: Path) -> None:
    """Put the finished folder `staging` in place of `target`; whatever was there goes."""
    old = backup_path(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(staging, target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
