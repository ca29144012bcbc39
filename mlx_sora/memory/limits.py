"""Memory limits in a scope, freeing between stages, and what a stage cost in seconds and bytes."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import mlx.core as mx

from mlx_sora.runtime.device import backend, total_memory

#: Seconds between looks at the resident set, at first and after 20 s; a look costs about 20 µs.
_PAUSE, _LONGEST_PAUSE = 0.01, 0.1

_STATM = Path("/proc/self/statm")
_PAGE = resource.getpagesize()


#: mallopt's names in glibc's malloc.h, and the size from which allocations are the system's own.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGE = -1, -3, 1 << 20

#: Where glibc's own adjusting of both ends up once a program frees large arrays.
_ADJUSTED = 32 << 20


def default_cache_limit() -> int | None:
    """Bytes of freed buffers MLX may keep: min(4 GiB, RAM/6) on CPUs; None (MLX's own) on GPUs.

    MLX's CPU default of 32 MiB returns nearly every activation to the system: seven times slower
    element-wise work on large arrays.
    """
    return min(4 << 30, total_memory() // 6) if backend() == "cpu" else None


def release() -> None:
    """Give back what nothing refers to any more: garbage cycles, then MLX's cached buffers."""
    gc.collect()
    mx.clear_cache()


@contextmanager
def memory_scope(cache_limit: int | None = None) -> Iterator[None]:
    """Run with MLX's cache limit at `cache_limit` bytes (None: the default); then restore it.

    The cache is emptied on the way out, so that the limit before also holds afterwards.
    """
    limit = default_cache_limit() if cache_limit is None else cache_limit
    previous = None if limit is None else mx.set_cache_limit(limit)
    try:
        yield
    finally:
        if previous is not None:
            mx.set_cache_limit(previous)
        release()


@contextmanager
def return_freed_memory() -> Iterator[None]:
    """While this runs, freed memory of 1 MiB and more goes back to the system at once (glibc).

    Left alone, glibc takes up to 32 MiB at a time from heaps that it cannot shrink in the middle:
    a full-size run holds half a gigabyte of holes between its weights and activations. On systems
    without mallopt nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        yield
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_TRIM_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _ADJUSTED)
        mallopt(_TRIM_THRESHOLD, 2 * _ADJUSTED)


@dataclass(frozen=True)
class StageUsage:
    """Cost of one stage: wall seconds; peaks of MLX's allocator and of the resident set, bytes."""

    stage: str
    seconds: float
    peak_memory: int
    peak_rss: int


class StageMeter:
    """Context manager that measures one stage; `usage` is there when it ends.

    Meters do not nest: each resets MLX's peak. The resident set's peak is exact when the stage
    raised the process's own record, else the largest of samples taken every 10 ms, more rarely the
    longer it takes; where the system shows no current value (macOS) it is the process's record so
    far, an upper bound.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.usage: StageUsage | None = None
        self._done = threading.Event()
        self._peak_rss = 0
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> StageMeter:
        mx.reset_peak_memory()
        self._record = max_rss()
        self._started = time.perf_counter()
        if current_rss() is not None:
            self._sampler = threading.Thread(target=self._sample, name="rss", daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds = time.perf_counter() - self._started
        self._done.set()
        if self._sampler is not None:
            self._sampler.join()
        record = max_rss()
        # The kernel's record misses nothing, but only a new one belongs to this stage.
        exact = record > self._record or self._sampler is None
        peak = record if exact else self._peak_rss
        self.usage = StageUsage(self.stage, seconds, mx.get_peak_memory(), peak)

    def _sample(self) -> None:
        pause = _PAUSE
        while True:
            self._peak_rss = max(self._peak_rss, current_rss() or 0)
            if self._done.wait(pause):
                return
            pause = min(1.005 * pause, _LONGEST_PAUSE)


def current_rss() -> int | None:
    """Resident bytes of this process now; None where the system has no cheap way to tell."""
    try:
        return int(_STATM.read_bytes().split()[1]) * _PAGE
    except OSError:
        return None


def max_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
