"""Memory of a process as macOS counts it: the physical footprint, with GPU and compressed pages."""

from __future__ import annotations

import ctypes
import platform

_LIBRARY = "/usr/lib/libproc.dylib"
_RUSAGE_INFO_V4 = 4

#: struct rusage_info_v4: 16 bytes of UUID, then 35 numbers of 64 bits. A newer kernel writes no
#: more than this version of the struct.
_UUID, _NUMBERS = 16, 35

#: Indices of ri_phys_footprint and ri_lifetime_max_phys_footprint among the numbers.
_FOOTPRINT, _LIFETIME_MAX = 7, 28


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
