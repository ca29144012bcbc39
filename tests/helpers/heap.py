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


def heap_in_use() -> int:
    """Return the bytes in use: those of malloc (glibc's), and of Python's objects, estimated."""
    gc.collect()
    objects = sys.getallocatedblocks() * BLOCK
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # no glibc, or one before 2.33
        return objects
    mallinfo.restype = MallInfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd) + objects
