"""Ends of processes: signals, locks, names that say who owns a file, and removal of leftovers.

A killed process removes nothing. So the names of temporary files and folders say which process of
which machine owns them, and whoever writes to the same folder next removes those of ended ones.
Files of other machines, which share a disk, stay.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

#: Suffixes of hidden files: one being written, one that a sequence replaces, and the journal of
#: the renames of a sequence.
PARTIAL, REPLACED, JOURNAL = ".partial", ".replaced", ".journal"

#: Prefix of temporary folders.
_FOLDER_PREFIX = "mlx_sora-"

_OWNER = re.compile(r"-([0-9a-f]{8})-(\d+)-(\d+)-")
_FILE = re.compile(rf"\.[0-9a-f]{{12}}{_OWNER.pattern}[0-9a-f]{{8}}\.(partial|replaced|journal)")
_LOCK = re.compile(r"\.[0-9a-f]{12}\.lock")

#: Seconds after which a lock without an owner, of a process killed in between, is removed.
_MIN_AGE = 60.0


def owned_name(prefix: str, suffix: str = "") -> str:
    """Return a new name, prefix-MACHINE-PROCESS-START-RANDOM, of a file of this process."""
    return f"{prefix}-{_owner()}-{os.urandom(4).hex()}{suffix}"


def is_abandoned(name: str) -> bool:
    """Return True if a name has an owner on this machine, and that process has ended."""
    match = _OWNER.search(name)
    return match is not None and match[1] == _machine() and not _runs(int(match[2]), int(match[3]))


def is_of_this_machine(name: str) -> bool:
    """Return True if a name has an owner on this machine, running or not."""
    match = _OWNER.search(name)
    return match is not None and match[1] == _machine()


def sweep(folder: Path) -> None:
    """Remove the hidden files and locks of ended processes from `folder`; never raises OSError.

    Journals of sequences, and what these need to be rolled back, stay.
    """
    with suppress(OSError):
        names = os.listdir(folder)
        abandoned = [name for name in filter(_FILE.fullmatch, names) if is_abandoned(name)]
        if not any(name.endswith(JOURNAL) for name in abandoned):
            for name in abandoned:
                _remove(folder / name)
        for name in filter(_LOCK.fullmatch, names):
            _remove_free_lock(folder / name)


def sweep_temporary_folders(parent: str | None = None) -> None:
    """Remove the temporary folders of ended processes. parent: None for the system's folder."""
    with suppress(OSError):
        place = Path(tempfile.gettempdir() if parent is None else parent)
        for name in os.listdir(place):
            if name.startswith((_FOLDER_PREFIX, f".{_FOLDER_PREFIX}")) and is_abandoned(name):
                _remove(place / name)


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a folder for the block. After a kill, the next process that makes one removes it.

    parent: None for the system's folder of temporary files; elsewhere the name is hidden.
    """
    sweep_temporary_folders(None if parent is None else str(parent))
    prefix = _FOLDER_PREFIX if parent is None else f".{_FOLDER_PREFIX}"
    name = owned_name(prefix.rstrip("-"), "-")
    with tempfile.TemporaryDirectory(dir=parent, prefix=name) as folder:
        yield Path(folder)


def acquire_lock(path: Path, *, create: bool = True) -> int | None:
    """Lock the file `path` without waiting; return the handle, None if another holds it.

    The system frees the lock however the process ends. Raises OSError where nothing can be locked,
    and for a missing file without `create`.
    """
    while True:
        handle = _open(path, os.O_CREAT if create else 0)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(handle, path):  # else its last holder has removed it meanwhile
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def sign_lock(handle: int) -> None:
    """Write into a lock which process holds it, so that only this machine removes it."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"-{_owner()}-\n".encode(), 0)


def _open(path: Path, flags: int) -> int:
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | flags, 0o666)
    except PermissionError:  # a file of another user
        return os.open(path, os.O_RDONLY | flags & ~os.O_CREAT)


def _is_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove_free_lock(path: Path) -> None:
    with suppress(OSError):
        handle = acquire_lock(path, create=False)
        if handle is None:
            return
        try:
            owner = _OWNER.search(os.pread(handle, 200, 0).decode("ascii", "replace"))
            old = time.time() - os.fstat(handle).st_mtime > _MIN_AGE
            if old if owner is None else owner[1] == _machine():
                path.unlink()
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)


def _owner() -> str:
    process = os.getpid()
    return f"{_machine()}-{process}-{_start_time(process) or 0}"


@cache
def _machine() -> str:
    """Return 8 hexadecimal digits for this machine, or for the container of this process."""
    name = platform.node()
    with suppress(OSError):  # processes of other containers cannot be seen
        name += os.readlink("/proc/self/ns/pid")
    if sys.platform == "darwin":  # whose name changes with the network
        with suppress(AttributeError, OSError):
            name = _host_uuid()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _host_uuid() -> str:
    import ctypes

    found, wait = (ctypes.c_uint8 * 16)(), (ctypes.c_long * 2)(0, 0)
    if ctypes.CDLL(None).gethostuuid(found, ctypes.byref(wait)) != 0:
        raise OSError("the machine has no identifier")
    return bytes(found).hex()


def _runs(process: int, start: int) -> bool:
    """Return True if the process that began at `start` (0: unknown) runs still."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        pass
    found = _start_time(process)
    return not start or found is None or found == start


def _start_time(process: int) -> int | None:
    """Return when a process began, in a unit of the system. None: unknown; -1: it has ended."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" else int(fields[19])
    if sys.platform == "darwin":
        with suppress(AttributeError, OSError):
            return _start_time_on_macos(process)
    return None


def _start_time_on_macos(process: int) -> int | None:
    """Return microseconds, from struct proc_bsdinfo of <sys/proc_info.h>."""
    import ctypes

    size, flavor, seconds_at = 136, 3, 120  # PROC_PIDTBSDINFO
    record = (ctypes.c_uint8 * size)()
    library = ctypes.CDLL("/usr/lib/libproc.dylib")
    if library.proc_pidinfo(process, flavor, ctypes.c_uint64(0), record, size) != size:
        return None
    seconds, micros = (ctypes.c_uint64 * 2).from_buffer(record, seconds_at)
    return int(seconds) * 1_000_000 + int(micros)


@contextmanager
def signals_as_exceptions(make: Callable[[int], BaseException]) -> Iterator[None]:
    """Raise what `make` returns at SIGTERM and SIGHUP inside the block: partial files are removed.

    A signal that is ignored, as SIGHUP under nohup, or has a handler keeps it.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal may send several
        raise make(number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    if not _is_main_thread():
        numbers = []
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers if _is_main_thread() else ():
            if signal.getsignal(number) in (interrupt, signal.SIG_IGN):
                signal.signal(number, signal.SIG_DFL)


def exit_like(number: int) -> SystemExit:
    """Return the exit of a process that signal `number` ends, with the code that shells show."""
    return SystemExit(128 + number)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP wait until the end of the block. Its work must be short."""
    received: list[int] = []
    if not _is_main_thread():  # in which all signals are handled
        yield
        return
    before: dict[int, Any] = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received[:1]:
            signal.raise_signal(number)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
