"""Checks of what the engine assumes of MLX: devices, streams, reading ahead, memory and limits.

Each yields its results. A new check is a function and a line in `MLX_CHECKS`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_sora.accel.cidl import BlockStream
from mlx_sora.loading.blocks import BlockSource, split_blocks
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.manage.machine_check import (
    BUSY,
    OK,
    REPORT,
    SKIPPED,
    SLOW,
    WRONG,
    Allowance,
    CheckResult,
)
from mlx_sora.manage.machine_forms import normals
from mlx_sora.memory.limits import memory_scope, process_memory, release
from mlx_sora.memory.profiles import format_bytes
from mlx_sora.models.key_map import KeyMap
from mlx_sora.models.layers import Linear
from mlx_sora.runtime.device import backend, describe_machine
from mlx_sora.utils.leftovers import temporary_folder

#: Bytes of an array whose allocation the readings have to show.
_ARRAY_BYTES = 64 << 20

#: Blocks of the streamed network, layers of each, and their width at full size.
_BLOCKS, _LAYERS, _WIDTH = 4, 4, 2048

#: Free space that the temporary file needs, with a reserve.
_FREE_BYTES = 1 << 30

#: Computing takes this many times as long as loading, of which it has to hide at least this share.
_COMPUTE_RATIO, _LEAST_HIDDEN = 1.5, 0.3

_STREAM_ADVICE = f"Run with --memory-budget off, which streams nothing. {REPORT}"
_BUDGET_ADVICE = f"Memory budgets may not hold: give a lower --memory-budget. {REPORT}"


def check_device(allowance: Allowance) -> Iterator[CheckResult]:
    """Look for a GPU."""
    facts = describe_machine()
    if backend() != "cpu":
        yield CheckResult("GPU", OK, f"{facts['device']} ({facts['backend']})")
    elif sys.platform == "darwin":
        advice = "Use macOS 14 or later and a Python for arm64."
        yield CheckResult("GPU", SLOW, "none: everything runs on the CPU", advice=advice)
    else:
        message = f"none: MLX's own kernels are checked on the CPU, {facts['device']}"
        yield CheckResult("GPU", SKIPPED, message)


def check_streaming(allowance: Allowance) -> Iterator[CheckResult]:
    """Stream blocks from a temporary file, one after the other and ahead of their use."""
    width = _WIDTH if allowance.flops > 1e9 else _WIDTH // 16  # for quick tests
    with temporary_folder() as folder, memory_scope():
        if shutil.disk_usage(folder).free < _FREE_BYTES:
            message = f"{tempfile.gettempdir()} has less than {format_bytes(_FREE_BYTES)} free"
            yield CheckResult("streams", SKIPPED, message, advice="Free space, or set TMPDIR.")
            return
        network = _Blocks(width)
        path = folder / "model.safetensors"
        names = list(dict(tree_flatten(network.parameters())))
        weights = [x / width**0.5 for x in normals(*[(width, width)] * len(names))]
        mx.save_safetensors(str(path), dict(zip(names, weights, strict=True)))
        del weights
        source = split_blocks(
            "test network",
            network,
            {(f"blocks.{i}.",): block for i, block in enumerate(network.blocks)},
            Checkpoint.open(path),
            KeyMap(),
            dtype=mx.float32,
        )
        yield from _stream_passes(source, width)


class _Blocks(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = [
            [Linear(width, width, bias=False) for _ in range(_LAYERS)] for _ in range(_BLOCKS)
        ]


def _stream_passes(source: BlockSource[list[Linear]], width: int) -> Iterator[CheckResult]:
    """Stream without and with reading ahead. The second thread uses the stream of the first."""
    (x,) = normals((256, width))
    with BlockStream(source, prefetch=False) as stream:
        _pass(stream, x)  # compiles, and fills the cache of the system
        start = time.perf_counter()
        before = stream.stats.load_seconds
        serial = _pass(stream, x)
        loading = stream.stats.load_seconds - before
        computing = time.perf_counter() - start - loading
    repeats = max(1, round(_COMPUTE_RATIO * loading / max(computing, 1e-6)))
    start = time.perf_counter()
    with BlockStream(source, cyclic=True) as stream:
        ahead = [_pass(stream, x, repeats) for _ in range(2)][-1]
        stats = stream.stats
    seconds = time.perf_counter() - start
    expected = _resident_pass(source, x)
    if not (mx.array_equal(serial, expected) & mx.array_equal(ahead, expected)).item():
        message = "blocks that a thread loads give other numbers"
        yield CheckResult("streams", WRONG, message, advice=_STREAM_ADVICE)
        return
    yield CheckResult("streams", OK, "a thread's CPU stream loads what the device computes with")
    hidden = max(0.0, 1 - stats.wait_seconds / stats.load_seconds)
    speed = stats.nbytes / stats.load_seconds / 1e9
    message = f"{hidden:.0%} of loading is hidden behind computing, at {speed:.1f} GB/s"
    if hidden >= _LEAST_HIDDEN:
        yield CheckResult("reading ahead", OK, message, seconds=seconds)
    else:
        advice = f"{BUSY} Streamed runs wait for the disk: raise --memory-budget."
        yield CheckResult("reading ahead", SLOW, message, seconds=seconds, advice=advice)


def _pass(stream: BlockStream[list[Linear]], x: mx.array, repeats: int = 1) -> mx.array:
    """Return x after all blocks, each applied `repeats` times to the same input."""
    for index in range(_BLOCKS):
        block = stream.get(index)
        x = _apply(block, x, repeats)
        stream.release(index, x)
    return x


def _resident_pass(source: BlockSource[list[Linear]], x: mx.array) -> mx.array:
    """Return x after all blocks, which this thread loads."""
    for index, block in enumerate(source.blocks):
        source.assign(index, source.load(index))
        x = _apply(block, x)
        mx.eval(x)
        source.clear(index)
    return x


def _apply(block: list[Linear], x: mx.array, repeats: int = 1) -> mx.array:
    outputs: list[mx.array] = []
    for _ in range(repeats):
        y = mx.depends(x, outputs[-1:])
        for layer in block:
            y = layer(y)
        outputs.append(y)
    return outputs[-1]


def check_memory(allowance: Allowance) -> Iterator[CheckResult]:
    """Allocate and free an array, and compare MLX's and the system's readings."""
    size = _ARRAY_BYTES
    with memory_scope(2 * size):
        _settle()
        mx.reset_peak_memory()
        active = mx.get_active_memory()
        x = mx.arange(size // 4)
        mx.eval(x)
        mx.synchronize()
        grown = mx.get_active_memory() - active
        peak = mx.get_peak_memory() - active
        del x
        mx.synchronize()
        freed, cached = mx.get_active_memory() - active, mx.get_cache_memory()
        _settle()
        mx.reset_peak_memory()
        faults = {
            "active memory does not show an array": not _near(grown, size),
            "the peak does not show an array": not _near(peak, size),
            "active memory does not fall when an array is freed": not _near(freed + size, size),
            "a freed array is not in the cache": cached < size,
            "clear_cache leaves a cache": mx.get_cache_memory() >= size,
            "reset_peak_memory leaves the peak": mx.get_peak_memory() - active >= size,
        }
    yield _verdict("memory readings", faults, "active, peak and cache follow an array")
    yield _footprint(size)
    _settle()


def _footprint(size: int) -> CheckResult:
    """Judge whether the memory of the process grows with arrays of `size` bytes.

    The first ones may lie in memory that the C library has not given back to the system.
    """
    before = after = process_memory()
    arrays: list[mx.array] = []
    while before and after and after - before < size // 2 and len(arrays) < 3:
        arrays.append(mx.arange(size // 4))
        mx.eval(arrays)
        mx.synchronize()
        after = process_memory()
    name = "memory of the process"
    if before is None or after is None:
        message = "the system does not report it"
        return CheckResult(name, SKIPPED, message)
    if backend() == "cuda" or after - before >= size // 2:
        return CheckResult(name, OK, f"{after / 1e6:.0f} MB")
    message = f"grows by {(after - before) / 1e6:.0f} MB with arrays of {3 * size / 1e6:.0f} MB"
    return CheckResult(name, WRONG, message, advice=_BUDGET_ADVICE)


def check_limits(allowance: Allowance) -> Iterator[CheckResult]:
    """Set the limits of cache and memory as a run does."""
    size = _ARRAY_BYTES // 4
    before = mx.set_cache_limit(size)
    with memory_scope(size // 2):
        arrays = [mx.arange(size // 4) + i for i in range(3)]
        mx.eval(arrays)
        del arrays
        mx.synchronize()
        cached = mx.get_cache_memory()
    restored = mx.set_cache_limit(before)
    faults = {
        "the cache outgrows set_cache_limit": cached > 3 * size // 2,
        "set_cache_limit does not return the limit before": restored != size,
    }
    yield _verdict("cache limit", faults, "obeyed and restored")
    with memory_scope(0):
        active = mx.get_active_memory()
        x = mx.arange(size // 4)
        mx.eval(x)
        mx.reset_peak_memory()
        limit = mx.set_memory_limit(0)
        for _ in range(12):
            x = mx.concatenate([x[1:], x[:1]])
        mx.eval(x)
        restored = mx.set_memory_limit(limit)
        peak = mx.get_peak_memory() - active
        faults = {
            "work over the limit gives wrong numbers": x[0].item() != 12,
            "set_memory_limit does not return the limit before": restored != 0,
            # CUDA's does not, as plans know (`Machine.can_throttle`).
            "set_memory_limit does not hold back MLX's scheduler": peak > 9 * size
            and backend() != "cuda",
        }
    held = "is restored" if backend() == "cuda" else "holds back work"
    yield _verdict("memory limit", faults, f"{held}, and work over it still ends")


def _verdict(name: str, faults: dict[str, bool], message: str) -> CheckResult:
    found = [fault for fault, is_present in faults.items() if is_present]
    if found:
        return CheckResult(name, WRONG, "; ".join(found), advice=_BUDGET_ADVICE)
    return CheckResult(name, OK, message)


def _near(reading: int, size: int) -> bool:
    return abs(reading - size) <= size // 8


def _settle() -> None:
    mx.synchronize()
    release()


MLX_CHECKS = {
    "GPU": check_device,
    "streams": check_streaming,
    "memory readings": check_memory,
    "limits": check_limits,
}
