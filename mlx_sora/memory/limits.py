"""Memory limits in a scope, memory returned between stages, and the cost of a stage."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_sora.runtime.device import backend, gpu_memory, total_memory
from mlx_sora.runtime.footprint import current_footprint, peak_footprint

#: Seconds between samples of the resident set, at first and after 20 s. A sample takes 20 µs.
_FIRST_INTERVAL, _LAST_INTERVAL = 0.01, 0.1

_STATM = Path("/proc/self/statm")
_PAGE = resource.getpagesize()

#: Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

#: Larger allocations come from the system and return to it.
_LARGE = 1 << 20

#: The value of M_MMAP_THRESHOLD that glibc itself reaches after a program has freed large arrays.
_GLIBC_MMAP_THRESHOLD = 32 << 20

#: The smallest limit of MLX's cache. Below it, every large activation is a system call.
MIN_CACHE = 32 << 20

#: Share of the RAM that may be wired.
_WIRED_SHARE = 0.65

#: Set when MLX's scheduler can no longer hold a memory limit; see `recover_from_failed_read`.
_throttling_stopped = threading.Event()


def default_cache_limit() -> int | None:
    """Return the bytes of freed buffers MLX may keep: min(4 GiB, RAM / 6) on CPUs, None on GPUs.

    None leaves MLX's default. That of CPUs, 32 MiB, returns nearly every activation to the system,
    which makes element-wise operations on large arrays seven times slower.
    """
    return min(4 << 30, total_memory() // 6) if backend() == "cpu" else None


def least_cache(activations: int, *, gpu: bool) -> int:
    """Return the smallest cache limit under which activations are no system calls.

    On CPUs no more than activations can use, in bytes.
    """
    return MIN_CACHE if gpu else min(MIN_CACHE, activations)


def cache_limit(spare: int, activations: int, most: int, *, gpu: bool) -> int:
    """Return half of the `spare` bytes, up to `most`, but no more than activations can use."""
    least = least_cache(activations, gpu=gpu)
    return min(max(least, min(most, activations)), max(least, spare // 2))


def release() -> None:
    """Free garbage cycles, then MLX's cached buffers, also those that a GPU still uses."""
    gc.collect()
    with suppress(RuntimeError):  # an error of the GPU, which its stage has raised
        mx.synchronize()
    mx.clear_cache()


@contextmanager
def memory_scope(cache_limit: int | None = None) -> Iterator[None]:
    """Set MLX's cache limit in bytes (None: `default_cache_limit`); restore it afterwards.

    Releases memory on exit, so the previous limit also holds then.
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
def wired_memory(nbytes: int) -> Iterator[None]:
    """Keep up to `nbytes` of MLX's buffers wired on Metal: the system does not page them out.

    At most Metal's working set and 65 % of the RAM, since Macs with more of it wired have frozen
    (exo pull request 1672).
    """
    if backend() != "metal":
        yield
        return
    working_set = gpu_memory() or 0
    previous = mx.set_wired_limit(int(min(nbytes, working_set, _WIRED_SHARE * total_memory())))
    try:
        yield
    finally:
        mx.set_wired_limit(previous)


def set_memory_limit(limit: int) -> int | None:
    """Set MLX's memory limit in bytes; return the previous one, or None once throttling stopped.

    Above the limit MLX's scheduler waits for running operations instead of allocating ahead.
    """
    return None if _throttling_stopped.is_set() else mx.set_memory_limit(limit)


def restore_memory_limit(previous: int | None) -> None:
    """Restore a limit that `set_memory_limit` returned."""
    if previous is not None and not _throttling_stopped.is_set():
        mx.set_memory_limit(previous)


def recover_from_failed_read() -> None:
    """Let MLX work on after a failed read in the main thread.

    Its stream raises one error; that of a second read would surface in an operation of a later run.
    MLX 0.32.4 may also count a task that never ends (`CommandEncoder::dispatch` of its CPU
    backend), and its scheduler waits for that task whenever memory is above the limit: the limit is
    lifted for the rest of the process.
    """
    if threading.current_thread() is threading.main_thread():
        _throttling_stopped.set()
        mx.set_memory_limit(sys.maxsize)
        for _ in range(2):  # an error that was there before the call comes first
            with suppress(RuntimeError):
                mx.synchronize(mx.default_stream(mx.cpu))


@contextmanager
def return_freed_memory() -> Iterator[None]:
    """Have glibc return freed blocks of 1 MiB or more to the system at once.

    By default glibc takes blocks of up to 32 MiB from heaps that it cannot shrink in the middle: a
    full-size run then holds half a gigabyte of holes between weights and activations. Nothing
    changes on systems without mallopt.
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
        mallopt(_MMAP_THRESHOLD, _GLIBC_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, 2 * _GLIBC_MMAP_THRESHOLD)


@dataclass(frozen=True)
class StageUsage:
    """Cost of a stage: wall seconds, peaks of MLX's allocator and of the process in bytes."""

    stage: str
    seconds: float
    peak_memory: int
    peak_rss: int


class StageMeter:
    """Context manager that measures one stage; `usage` is set at its end.

    Meters do not nest, as each resets MLX's peak. The peak of the process is exact if the stage
    raised it. Else it is the largest sample; samples are 10 ms apart, later 100 ms. On systems
    without a current value it is the peak of the process so far, an upper bound.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.usage: StageUsage | None = None
        self._done = threading.Event()
        self._peak_rss = 0
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> StageMeter:
        mx.reset_peak_memory()
        self._peak_before = peak_process_memory()
        self._started = time.perf_counter()
        if process_memory() is not None:
            self._sampler = threading.Thread(target=self._sample, name="rss", daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self._started
        self._done.set()
        if self._sampler is not None:
            self._sampler.join()
        # The kernel's peak misses nothing, but belongs to this stage only if the stage raised it.
        peak = peak_process_memory()
        if peak <= self._peak_before and self._sampler is not None:
            peak = self._peak_rss
        self.usage = StageUsage(self.stage, seconds, mx.get_peak_memory(), peak)

    def _sample(self) -> None:
        interval = _FIRST_INTERVAL
        while True:
            self._peak_rss = max(self._peak_rss, process_memory() or 0)
            if self._done.wait(interval):
                return
            interval = min(1.005 * interval, _LAST_INTERVAL)


def process_memory() -> int | None:
    """Return the bytes of this process: the resident set, or macOS's physical footprint.

    None on other systems.
    """
    try:
        return int(_STATM.read_bytes().split()[1]) * _PAGE
    except OSError:
        return current_footprint(os.getpid())


def peak_process_memory() -> int:
    """Return the peak of `process_memory` so far, in bytes."""
    if sys.platform == "darwin":
        return peak_footprint(os.getpid()) or 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
