"""Which device MLX runs on, what precision suits it, and what `info` says about the machine."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

import mlx.core as mx

from mlx_sora.errors import MemoryBudgetError, MlxSoraError, UsageError
from mlx_sora.models.precision import check_text_encoder
from mlx_sora.request.generation import DTYPES
from mlx_sora.runtime import blas
from mlx_sora.utils.versions import versions


def default_dtype(device: mx.Device | None = None, requested: str = "auto") -> mx.Dtype:
    """Precision of weights and activations on `device` (default: MLX's default device).

    auto: bfloat16 on GPUs, float32 on CPUs. bfloat16 on a Linux CPU is refused with a UsageError:
    MLX multiplies it there without BLAS, about 18 times slower than float32. So are unknown names.
    """
    if requested == "float16":
        check_text_encoder(mx.float16)
    if requested not in DTYPES:
        raise UsageError(f"Unknown dtype {requested!r}.", f"Choose one of: {', '.join(DTYPES)}.")
    on_cpu = (device or mx.default_device()) == mx.Device(mx.cpu)
    if requested == "bfloat16" and on_cpu and sys.platform == "linux":
        raise UsageError(
            "bfloat16 is about 18 times slower than float32 on a Linux CPU.",
            "Use --dtype float32 or auto, or a GPU.",
        )
    if requested == "auto":
        return mx.float32 if on_cpu else mx.bfloat16
    return mx.float32 if requested == "float32" else mx.bfloat16


def backend() -> str:
    """`metal`, `cuda` or `cpu`: where MLX's default device computes."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def blas_notice() -> str:
    """One line to show once when the CPU lacks a fast BLAS and computes; empty otherwise."""
    return blas.install().notice if backend() == "cpu" else ""


def total_memory() -> int:
    """Bytes of RAM this process may use: the machine's, or its container's limit if lower."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return memory


def describe_machine() -> dict[str, object]:
    """The machine as `info` and metadata show it: plain JSON values, bytes, no one's folders."""
    library = blas.install()
    return {
        "backend": backend(),
        "device": str(mx.device_info().get("device_name", platform.processor())),
        "dtype": str(default_dtype()).removeprefix("mlx.core."),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "memory": total_memory(),
        "blas": library.name,
        "blas_library": Path(library.path).name,
        "blas_fast": library.fast,
        "versions": versions(),
    }


_LESS = "Give a smaller --memory-budget (--dry-run shows what fits), or make a smaller video."
_PARTS = "Use --sequential-guidance or --vae-tiles 2, or make a smaller video."
_CALM = (
    "Let the display sleep or close what draws on it; --sequential-guidance, --vae-tiles 2 or a "
    "smaller video give it less at a time."
)

#: What a message holds; the error that it is; what happened; what to do.
_TABLE: tuple[tuple[str, type[MlxSoraError], str, str], ...] = (
    (
        r"greater than the maximum allowed buffer size",
        MemoryBudgetError,
        "one array is larger than the GPU takes",
        _PARTS,
    ),
    (
        r"\[metal::malloc\] Resource limit",
        MemoryBudgetError,
        "too many arrays are alive at a time",
        _LESS,
    ),
    (
        r"kIOGPUCommandBufferCallbackErrorOutOfMemory|Insufficient Memory"
        r"|\[malloc(_or_wait)?\] Unable to allocate|std::bad_alloc"
        r"|cuda\w+.*(out of memory|cudaErrorMemoryAllocation)|CUDA_ERROR_OUT_OF_MEMORY",
        MemoryBudgetError,
        "there is not enough memory",
        _LESS,
    ),
    (
        r"kIOGPUCommandBufferCallbackError(Timeout|ImpactingInteractivity|Hang)"
        r"|Caused GPU (Timeout|Hang) Error|Impacting Interactivity",
        MlxSoraError,
        "the system has ended work that kept the GPU too long",
        _CALM,
    ),
)


def explain_device_error(error: BaseException, stage: str) -> MlxSoraError | None:
    """What `error`, raised in `stage`, means for the user; None where it is of another kind."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, MemoryError):
        return MemoryBudgetError(f"Stage {stage}: there is not enough memory.", _LESS)
    for pattern, kind, what, fix in _TABLE:
        if isinstance(error, RuntimeError) and re.search(pattern, text):
            return kind(f"Stage {stage}: {what} ({text.rstrip('.')}).", fix)
    return None
