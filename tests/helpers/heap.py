"""Memory in use on the heap, which the resident set, with what was freed, only bounds."""

from __future__ import annotations

import ctypes
import gc
import sys

#: Fields of glibc's struct mallinfo2, all of type size_t.
FIELDS = (*("arena", "ordblks", "smblks", "hblks", "hblkhd"),)
FIELDS += ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")

#: Mean size of a block of Python's own allocator, in bytes: objects of up to 512.
BLOCK = 64


class MallInfo(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def malloc_in_use() -> int | None:
    """Return the bytes that malloc has handed out, after a collection; None without mallinfo2.

    Not those that it keeps back, which make the resident set a poor witness.
    """
    gc.collect()
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:  # no glibc, or one before 2.33
        return None
    mallinfo.restype = MallInfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


def heap_in_use() -> int:
    """Return the bytes in use: those of malloc, and of Python's objects, estimated."""
    return (malloc_in_use() or 0) + sys.getallocatedblocks() * BLOCK
