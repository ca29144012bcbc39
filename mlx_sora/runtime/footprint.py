"""Memory of a process as macOS counts it, and memory that is available. Imports no MLX.

The physical footprint of macOS has GPU and compressed pages in it.
"""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress
from pathlib import Path

_LIBRARY = "/usr/lib/libproc.dylib"
_RUSAGE_INFO_V4 = 4

#: struct rusage_info_v4: 16 bytes of UUID, then 35 numbers of 64 bits. A newer kernel writes no
#: more than this version of the struct.
_UUID, _NUMBERS = 16, 35

#: Indices of ri_phys_footprint and ri_lifetime_max_phys_footprint among the numbers.
_FOOTPRINT, _LIFETIME_MAX = 7, 28

_CGROUP = Path("/sys/fs/cgroup")


def available_ram() -> int | None:
    """Return the bytes that a new process could hold without others losing theirs.

    None if the system does not tell.
    """
    try:
        import psutil

        free = int(psutil.virtual_memory().available)
    except (ImportError, OSError, RuntimeError):
        return None
    with suppress(OSError, ValueError, KeyError):  # the limit of a container
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
        free = min(free, limit - used)
    return max(0, free)


def current_footprint(pid: int) -> int | None:
    """Return the physical footprint of process `pid` in bytes.

    None if the system has no such measure (Linux) or the process has ended.
    """
    return _read(pid, _FOOTPRINT)


def peak_footprint(pid: int) -> int | None:
    """Return the largest physical footprint of process `pid` so far in bytes, or None as above."""
    return _read(pid, _LIFETIME_MAX)


def _read(pid: int, index: int) -> int | None:
    if platform.system() != "Darwin":
        return None
    record = (ctypes.c_uint8 * (_UUID + 8 * _NUMBERS))()
    library = ctypes.CDLL(_LIBRARY)
    if library.proc_pid_rusage(pid, _RUSAGE_INFO_V4, ctypes.byref(record)) != 0:
        return None
    return ctypes.c_uint64.from_buffer(record, _UUID + 8 * index).value
