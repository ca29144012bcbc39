"""Memory limits in a scope, released memory, and the meter of a stage."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import time

import mlx.core as mx
import pytest

from mlx_sora.memory import limits as memory
from tests.helpers.tolerance import on_real_gpu

MIB = 1 << 20


def cache_limit() -> int:
    """Return the current limit: MLX reports it only on setting another."""
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return int(limit)


def check_then_fail(expected: int) -> None:
    assert cache_limit() == expected
    raise KeyError


def test_memory_scope_restores_the_cache_limit_after_an_error() -> None:
    before = cache_limit()
    with pytest.raises(KeyError), memory.memory_scope(cache_limit=7 * MIB):
        check_then_fail(expected=7 * MIB)
    assert cache_limit() == before


def test_memory_scopes_nest() -> None:
    with memory.memory_scope(cache_limit=9 * MIB):
        with memory.memory_scope(cache_limit=5 * MIB):
            assert cache_limit() == 5 * MIB
        assert cache_limit() == 9 * MIB


def test_default_cache_limit_on_a_cpu_is_a_sixth_of_the_ram_up_to_4_gib(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "backend", lambda: "cpu")
    monkeypatch.setattr(memory, "total_memory", lambda: 6 << 30)
    assert memory.default_cache_limit() == 1 << 30
    monkeypatch.setattr(memory, "total_memory", lambda: 64 << 30)
    assert memory.default_cache_limit() == 4 << 30
    with memory.memory_scope():
        assert cache_limit() == 4 << 30


def test_default_cache_limit_on_a_gpu_is_that_of_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "backend", lambda: "metal")
    before = cache_limit()
    with memory.memory_scope():
        assert cache_limit() == before


def test_release_frees_cycles_and_the_cache() -> None:
    with memory.memory_scope(cache_limit=256 * MIB):
        memory.release()
        before = mx.get_active_memory()
        holder: dict[str, object] = {"data": mx.zeros((8 * MIB,)) + 1}
        mx.eval(holder["data"])
        holder["self"] = holder
        gc.disable()
        try:
            del holder
            assert mx.get_active_memory() >= before + 32 * MIB
            memory.release()
        finally:
            gc.enable()
        assert mx.get_active_memory() < before + 32 * MIB
        assert mx.get_cache_memory() == 0


def busy(megabytes: int, seconds: float = 0.05) -> None:
    """Hold an evaluated array of that size for a moment."""
    data = mx.ones((megabytes * MIB // 4,)) * 2
    mx.eval(data)
    time.sleep(seconds)


@pytest.mark.skipif(on_real_gpu(), reason="arrays may be outside the process")
def test_meter_reports_the_peaks_of_its_stage() -> None:
    memory.release()
    held = mx.get_active_memory()  # by fixtures of other tests
    with memory.memory_scope(cache_limit=0):
        with memory.StageMeter("large") as first:
            busy(96)
        with memory.StageMeter("small") as second:
            busy(24)
    assert first.usage is not None
    assert second.usage is not None
    assert (first.usage.stage, second.usage.stage) == ("large", "small")
    assert first.usage.seconds >= 0.05
    large, small = (usage.peak_memory - held for usage in (first.usage, second.usage))
    assert large >= 96 * MIB > small >= 24 * MIB
    assert first.usage.peak_rss >= 96 * MIB
    if memory.process_memory() is not None:
        assert second.usage.peak_rss < first.usage.peak_rss


def test_meter_reports_a_failed_stage() -> None:
    meter = memory.StageMeter("broken")
    with pytest.raises(ZeroDivisionError), meter:
        raise ZeroDivisionError
    assert meter.usage is not None
    assert meter.usage.peak_rss > 0


def test_meter_without_samples_reports_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "process_memory", lambda: None)
    with memory.StageMeter("macos") as meter:
        busy(1, 0.0)
    assert meter.usage is not None
    assert meter.usage.peak_rss == memory.peak_process_memory()


HOLES = """
import ctypes, sys
from contextlib import nullcontext
from mlx_sora.memory.limits import process_memory, return_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def allocate(size):
    pointer = libc.malloc(size)
    libc.memset(pointer, 1, size)
    return pointer

libc.free(allocate(30 << 20))  # glibc takes such sizes from the heap after this
with return_freed_memory() if sys.argv[1] == "scope" else nullcontext():
    blocks = [allocate(4 << 20) for _ in range(32)]
    before = process_memory()
    for block in blocks[:-1]:
        libc.free(block)
    print(before - process_memory())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_return_freed_memory_leaves_no_holes() -> None:
    def returned(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert returned("plain") < 16 << 20, "glibc keeps no holes any more: remove the scope"
    assert returned("scope") > 120 << 20
