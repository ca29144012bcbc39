"""A file appears under its name whole or not at all, and takes the place of none unasked."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from mlx_sora.errors import MlxSoraError

#: What to do about an error of the file system.
_FIXES = {
    errno.ENOSPC: "Make room there, or write to another disk.",
    errno.EDQUOT: "Your share of that disk is used up: make room, or write to another.",
    errno.EFBIG: "Files there may not grow so large (see ulimit -f): write to another folder.",
    errno.ENOENT: "Its folder is gone: make it again, or write to another.",
    errno.ENOTDIR: "Its folder is gone: make it again, or write to another.",
    errno.EIO: "The disk fails: write to another.",
}

logger = logging.getLogger(__name__)


@dataclass
class PartialFile:
    """partial: where to write; path: where the file is to be, and is once the block has ended."""

    partial: Path
    path: Path


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Say in one line what the file system refused inside, and what to do about it."""
    try:
        yield
    except OSError as problem:
        fix = _FIXES.get(problem.errno or 0, "Check the rights of its folder, or write to another.")
        reason = problem.strerror or problem
        raise MlxSoraError(f"Cannot write {path}: {reason}.", fix) from problem


@contextmanager
def atomic_write(path: Path, overwrite: bool = False) -> Iterator[PartialFile]:
    """A file to write in the block; after an error nothing is left of it."""
    remove_stale_partials(path)
    file = PartialFile(partial_name(path), path)
    with explain_os_errors(path):
        try:
            yield file
            file.path = rename_into_place(file.partial, path, overwrite)
        finally:
            remove_partial(file.partial)


def partial_name(path: Path) -> Path:
    """A hidden name in the same folder, so that renaming is atomic; short, whatever `path` is.

    It tells for which file and by which process of which machine it is written.
    """
    return path.with_name(f"{_partial_prefix(path)}{os.getpid()}-{os.urandom(4).hex()}.partial")


def remove_partial(partial: Path) -> None:
    """Remove what was not finished; where the disk no longer lets us, a later run sweeps it."""
    with suppress(OSError):
        partial.unlink()


def remove_stale_partials(path: Path) -> None:
    """Remove what killed processes of this machine have left of `path`."""
    mark = _partial_prefix(path)
    for file in path.parent.glob(f"{mark}*.partial"):
        process = file.name.removeprefix(mark).partition("-")[0]
        if process.isdecimal() and not _process_exists(int(process)):
            remove_partial(file)


def _partial_prefix(path: Path) -> str:
    """How the hidden names of a file begin on this machine."""
    name, machine = (hashlib.sha256(s.encode()).hexdigest() for s in (path.name, platform.node()))
    return f".{name[:12]}-{machine[:8]}-"


def _process_exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def free_names(path: Path) -> Iterator[Path]:
    """Names beside `path` to fall back on."""
    return (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in count(1))


def rename_into_place(partial: Path, path: Path, overwrite: bool) -> Path:
    """Rename `partial` to `path`; if a file appeared there meanwhile, to a free name beside it.

    Its bytes are on the disk before: some disks tell only then that they are full.
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


_READ_SIZE = 1 << 22


def sha256(path: Path, on_progress: Callable[[int], None] | None = None) -> str:
    """Checksum of a file, in hexadecimal. watch: told the bytes read so far."""
    return _digest(path, hashlib.sha256(), on_progress)


def git_sha1(path: Path) -> str:
    """Name that git gives to a file's content: how the hub identifies files outside LFS."""
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
    """Have a finished file, or a folder's entries, on the disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
