"""Atomic writes, of one file or of all files of a sequence; checksums; fsync."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.utils.json import MAX_JSON, parse_object, read_bytes
from mlx_sora.utils.leftovers import (
    JOURNAL,
    PARTIAL,
    REPLACED,
    acquire_lock,
    is_abandoned,
    is_of_this_machine,
    owned_name,
    sweep,
)

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

#: Bytes of a name to which a number can be added.
_LONG_NAME = 240

#: Bytes read at a time for a checksum.
_READ_SIZE = 1 << 22

#: Hidden name of a file that gets another one, and what identifies it.
_NewFile = tuple[str, list[int]]

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


@contextmanager
def new_folders(folder: Path) -> Iterator[None]:
    """Make a folder and its parents for the block; at its end remove new ones that are empty.

    Raises OSError if one cannot be made.
    """
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in missing:
            with suppress(OSError):  # of one that holds something
                each.rmdir()


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


def os_error_fix(problem: OSError, default: str) -> str:
    """Return what to do about an error of a disk, or `default`."""
    return _FIXES.get(problem.errno or 0, default)


def check_file(path: Path, fix: str) -> None:
    """Raise UsageError, with `fix`, unless `path` is a file."""
    if not path.is_file():
        what = f"{path} is a folder." if path.is_dir() else f"No such file: {path}."
        raise UsageError(what, fix)


@contextmanager
def explain_os_errors(path: Path, error: type[MlxSoraError] = MlxSoraError) -> Iterator[None]:
    """Raise `error`, which says what to do, for an OSError while `path` is written."""
    try:
        yield
    except OSError as problem:
        fix = os_error_fix(problem, "Check the rights of its folder, or write to another.")
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
    sweep(path.parent)
    file = PartialFile(partial_name(path), path)
    with explain_os_errors(path, error):
        try:
            yield file
            file.path = rename_into_place(file.partial, path, overwrite)
        finally:
            remove_partial(file.partial)


def partial_name(path: Path, suffix: str = PARTIAL) -> Path:
    """Return a short hidden name in the same folder, so that renaming is atomic.

    It encodes the file's name, the machine and the process that writes it.
    """
    return path.with_name(owned_name(f".{name_hash(path)}", suffix))


def remove_partial(partial: Path) -> None:
    """Remove an unfinished file. If that fails, a later run removes it as stale."""
    with suppress(OSError):
        partial.unlink()


def name_hash(path: Path) -> str:
    """Return 12 hexadecimal digits for a file's name, for short names of files beside it.

    Names that APFS takes for one, because they differ in case or in the form of accents only, have
    one hash on every file system: a lock too many costs little.
    """
    name = unicodedata.normalize("NFD", unicodedata.normalize("NFD", path.name).casefold())
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def free_names(path: Path) -> Iterator[Path]:
    """Yield names beside `path`: name-1, name-2, ..."""
    spare = max(0, len(os.fsencode(path.name)) - _LONG_NAME)
    stem = path.stem[: len(path.stem) - spare]
    return (path.with_name(f"{stem}-{i}{path.suffix}") for i in count(1))


def rename_into_place(partial: Path, path: Path, overwrite: bool) -> Path:
    """Rename `partial` to `path`, or without `overwrite` to a free name; return the new path.

    It also gets a free name where an existing file cannot be replaced. Calls fsync first: some
    disks report only then that they are full.
    """
    fsync(partial)
    reason = "appeared meanwhile"
    if overwrite:
        try:
            partial.replace(path)
            return path
        except OSError as error:
            if not os.path.lexists(path):
                raise
            reason = f"cannot be replaced ({error.strerror})"
    target, others = path, free_names(path)
    while not _rename_if_free(partial, target):
        target = next(others)
    if target != path:
        logger.warning("%s %s; wrote %s", path, reason, target)
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


def rename_all(files: Mapping[Path, Path], replaced: Iterable[Path] = ()) -> None:
    """Rename partial files to their paths in one folder, all or none; the first comes last.

    files: path to partial file. replaced: existing files that are removed. Raises FileExistsError
    if a path is neither free nor among them. After an error the renames are undone; after a kill
    `recover` does that, from a journal.
    """
    first = next(iter(files))
    for partial in files.values():
        fsync(partial)
    backups = {path: partial_name(path, REPLACED) for path in replaced}
    new = {path.name: (partial.name, _identity(partial)) for path, partial in files.items()}
    old = {path.name: backup.name for path, backup in backups.items()}
    journal = partial_name(first, JOURNAL)
    with _locked(journal):
        try:
            journal.write_text(json.dumps({"new": new, "old": old}))
            fsync(journal)
            _fsync_folder(first.parent)
            for path, backup in backups.items():
                path.rename(backup)
            for path, partial in reversed(list(files.items())):
                if not _rename_if_free(partial, path):
                    raise FileExistsError(errno.EEXIST, "another file has appeared", str(path))
            _fsync_folder(first.parent)
        except BaseException:
            with suppress(OSError):
                _undo(first.parent, new, old)
                journal.unlink()
            raise
        remove_partial(journal)
    for backup in backups.values():
        remove_partial(backup)


def recover(folder: Path) -> None:
    """Undo unfinished renames of killed processes in `folder`, then remove what they left.

    Renames are finished if the first file of the sequence has its name. Never raises OSError.
    """
    with suppress(OSError):
        for name in os.listdir(folder):
            if name.endswith(JOURNAL) and is_of_this_machine(name):
                _recover(folder / name)
    sweep(folder)


def _recover(journal: Path) -> None:
    try:
        with _locked(journal, create=False) as locked:
            if not locked and not is_abandoned(journal.name):
                return
            with suppress(ValueError):  # cut off: nothing was renamed yet
                new, old = _read_journal(journal)
                path, (_, identity) = next(iter(new.items()))
                if not _is(journal.with_name(path), identity):
                    _undo(journal.parent, new, old)
                    for name, _ in new.values():
                        remove_partial(journal.with_name(name))
            journal.unlink()
    except OSError as error:
        logger.debug("cannot recover %s", journal, exc_info=error)


@contextmanager
def _locked(journal: Path, *, create: bool = True) -> Iterator[bool]:
    """Lock a journal; yield True if that succeeded, False if another has it or nothing can."""
    handle = None
    with suppress(OSError):
        handle = acquire_lock(journal, create=create)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _read_journal(journal: Path) -> tuple[dict[str, _NewFile], dict[str, str]]:
    """Return the files of a sequence by name, and hidden names of those that they replace.

    Raises ValueError.
    """
    content = parse_object(read_bytes(journal, MAX_JSON))
    try:
        new = {str(k): (str(name), list(map(int, i))) for k, (name, i) in content["new"].items()}
        old = {str(k): str(name) for k, name in content["old"].items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("not a journal") from error
    hidden = [*(name for name, _ in new.values()), *old.values()]
    if not new or any(Path(name).name != name for name in (*new, *old, *hidden)):
        raise ValueError("not a journal")
    return new, old


def _undo(folder: Path, new: Mapping[str, _NewFile], old: Mapping[str, str]) -> None:
    """Undo the renames of a sequence as far as they were made."""
    for name, (hidden, identity) in new.items():
        if _is(folder / name, identity):
            if os.path.lexists(folder / hidden):
                (folder / name).unlink()  # killed between the two halves of a rename
            else:
                (folder / name).replace(folder / hidden)
    for name, hidden in old.items():
        if os.path.lexists(folder / hidden) and not os.path.lexists(folder / name):
            (folder / hidden).replace(folder / name)


def _identity(path: Path) -> list[int]:
    """Return what tells a file from others of its name, also after a rename."""
    found = path.stat(follow_symlinks=False)
    return [found.st_ino, found.st_mtime_ns, found.st_size]


def _is(path: Path, identity: list[int]) -> bool:
    try:
        found = _identity(path)
    except FileNotFoundError:
        return False
    # FAT numbers files by their place in the folder, which a rename changes.
    return found[0] == identity[0] or found[1:] == identity[1:]


def _fsync_folder(folder: Path) -> None:
    with suppress(OSError):  # which some file systems refuse
        fsync(folder)


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
