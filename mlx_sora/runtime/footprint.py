"""What macOS counts against a process: its physical footprint, Metal's buffers included.

Written after the headers `libproc.h` and `sys/resource.h` of macOS 10.12 and later; tested against
a stand-in for the library only.
"""

from __future__ import annotations

import ctypes
import platform

_LIBRARY = "/usr/lib/libproc.dylib"
_RUSAGE_INFO_V4 = 4

#: struct rusage_info_v4: 16 bytes of UUID, then 35 numbers of 64 bits. The kernel of a later
#: version never writes more than the version asked for.
_UUID, _NUMBERS = 16, 35

#: Place of ri_lifetime_max_phys_footprint among the numbers.
_LIFETIME_MAX = 28


def peak_footprint(pid: int) -> int | None:
    """Largest physical footprint of process `pid` so far, in bytes.

    None where the system has no such measure (Linux), or the process is not there any more.
    """
    if platform.system() != "Darwin":
        return None
    return read_peak(ctypes.CDLL(_LIBRARY), pid)


def read_peak(library: ctypes.CDLL, pid: int) -> int | None:
    """The same, from a `libproc` that has been loaded."""
    record = (ctypes.c_uint8 * (_UUID + 8 * _NUMBERS))()
    if library.proc_pid_rusage(pid, _RUSAGE_INFO_V4, ctypes.byref(record)) != 0:
        return None
    return ctypes.c_uint64.from_buffer(record, _UUID + 8 * _LIFETIME_MAX).value
