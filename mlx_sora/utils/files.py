"""Atomic writes, which replace a file only on request; checksums; fsync."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from mlx_sora.errors import MlxSoraError

_FIXES = {
    errno.ENOSPC: "Make room there, or write to another disk.",
    errno.EDQUOT: "Your quota on that disk is used up: make room, or write to another.",
    errno.EFBIG: "Files there may not grow so large (see ulimit -f): write to another folder.",
    errno.ENOENT: "Its folder is gone: create it again, or write to another.",
    errno.ENOTDIR: "Its folder is gone: create it again, or write to another.",
    errno.EIO: "The disk fails: write to another one.",
}

#: Environment variable with the folder for files that can be made again.
CACHE_VARIABLE = "MLX_SORA_CACHE"

#: Bytes read at a time for a checksum.
_READ_SIZE = 1 << 22

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder for files that can be made again; it may not exist yet.

    $MLX_SORA_CACHE, else mlx_sora in ~/Library/Caches on macOS, else in $XDG_CACHE_HOME or
    ~/.cache. Raises MlxSoraError without a home folder.
    """
    override = os.environ.get(CACHE_VARIABLE)
    if override:
        return Path(os.path.expanduser(override))
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        elif not base.is_absolute():  # which the specification has ignored
            base = Path.home() / ".cache"
    except RuntimeError:
        raise MlxSoraError("There is no home folder.", f"Set {CACHE_VARIABLE}.") from None
    return base / "mlx_sora"


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Return the entries of `folder` that match, sorted, without hidden ones.

    macOS puts a hidden ._NAME beside every NAME on disks and in archives that are not its own.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


@dataclass
class PartialFile:
    """A file being written. partial: where to write it; path: its name after the rename."""

    partial: Path
    path: Path


@contextmanager
def explain_os_errors(path: Path, error: type[MlxSoraError] = MlxSoraError) -> Iterator[None]:
    """Raise `error`, which says what to do, for an OSError while `path` is written."""
    try:
        yield
    except OSError as problem:
        fix = _FIXES.get(problem.errno or 0, "Check the rights of its folder, or write to another.")
        reason = problem.strerror or problem
        raise error(f"Cannot write {path}: {reason}.", fix) from problem


@contextmanager
def atomic_write(
    path: Path, overwrite: bool = False, error: type[MlxSoraError] = MlxSoraError
) -> Iterator[PartialFile]:
    """Yield a partial file to write, then rename it to `path`; remove it after an exception.

    Without `overwrite`, an existing file stays, and the new one gets a free name beside it.
    Raises `error` for what the file system refuses.
    """
    remove_stale_partials(path)
    file = PartialFile(partial_name(path), path)
    with explain_os_errors(path, error):
        try:
            yield file
            file.path = rename_into_place(file.partial, path, overwrite)
        finally:
            remove_partial(file.partial)


def partial_name(path: Path) -> Path:
    """Return a short hidden name in the same folder, so that renaming is atomic.

    It encodes the file's name, the machine and the process that writes it.
    """
    return path.with_name(f"{_partial_prefix(path)}{os.getpid()}-{os.urandom(4).hex()}.partial")


def remove_partial(partial: Path) -> None:
    """Remove an unfinished file. If that fails, a later run removes it as stale."""
    with suppress(OSError):
        partial.unlink()


def remove_stale_partials(path: Path) -> None:
    """Remove the partial files of `path` that killed processes of this machine have left."""
    mark = _partial_prefix(path)
    for file in path.parent.glob(f"{mark}*.partial"):
        process = file.name.removeprefix(mark).partition("-")[0]
        if process.isdecimal() and not _process_exists(int(process)):
            remove_partial(file)


def _partial_prefix(path: Path) -> str:
    machine = hashlib.sha256(platform.node().encode()).hexdigest()
    return f".{name_hash(path)}-{machine[:8]}-"


def name_hash(path: Path) -> str:
    """Return 12 hexadecimal digits for a file's name, for short names of files beside it.

    Names that APFS takes for one, because they differ in case or in the form of accents only, have
    one hash on every file system: a lock too many costs little.
    """
    name = unicodedata.normalize("NFD", unicodedata.normalize("NFD", path.name).casefold())
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _process_exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True


def free_names(path: Path) -> Iterator[Path]:
    """Yield names beside `path`: name-1, name-2, ..."""
    return (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in count(1))


def rename_into_place(partial: Path, path: Path, overwrite: bool) -> Path:
    """Rename `partial` to `path`, or without `overwrite` to a free name; return the new path.

    Calls fsync first: some disks report only then that they are full.
    """
    fsync(partial)
    if overwrite:
        partial.replace(path)
        return path
    target, others = path, free_names(path)
    while not _rename_if_free(partial, target):
        target = next(others)
    if target != path:
        logger.warning("%s appeared meanwhile; wrote %s", path, target)
    return target


def _rename_if_free(partial: Path, target: Path) -> bool:
    try:
        os.link(partial, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if target.exists():
            return False
        partial.replace(target)
        return True
    partial.unlink()
    return True


def sha256(path: Path, on_progress: Callable[[int], None] | None = None) -> str:
    """Return the checksum of a file, in hexadecimal. on_progress: gets the bytes read so far."""
    return _digest(path, hashlib.sha256(), on_progress)


def git_sha1(path: Path) -> str:
    """Return the hash of git's blob object: how the hub identifies files outside LFS."""
    start = b"blob %d\0" % path.stat().st_size
    return _digest(path, hashlib.sha1(start, usedforsecurity=False), None)


def _digest(path: Path, digest: Any, on_progress: Callable[[int], None] | None) -> str:
    done = 0
    with path.open("rb") as f:
        while block := f.read(_READ_SIZE):
            digest.update(block)
            done += len(block)
            if on_progress is not None:
                on_progress(done)
    return str(digest.hexdigest())


def fsync(file: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
