"""The device MLX runs on: its precision, its memory, its errors, and a description of it."""

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
    """Return the dtype of weights and activations on `device` (default: MLX's default device).

    auto: bfloat16 on GPUs, float32 on CPUs. Raises UsageError for unknown names and for bfloat16 on
    a Linux CPU: MLX multiplies it there without BLAS, about 18 times slower than float32.
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
    """Return `metal`, `cuda` or `cpu`, the backend of MLX's default device."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def blas_notice() -> str:
    """Return one line for users of a CPU without a fast BLAS; empty for others."""
    return blas.install().notice if backend() == "cpu" else ""


def total_memory() -> int:
    """Return the bytes of RAM of the machine, or the limit of its container if that is lower."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return memory


def describe_machine() -> dict[str, object]:
    """Return JSON values for `info` and metadata: sizes in bytes, no paths."""
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


_SMALLER_BUDGET = "Lower --memory-budget (--dry-run shows what fits) or make a smaller video."
_SMALLER_ARRAYS = "Use --sequential-guidance or --vae-tiles 2, or make a smaller video."
_SHORTER_WORK = (
    "Turn the display off or run it over ssh; or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1, with which "
    "the screen may stutter. --sequential-guidance, --vae-tiles 2 or a smaller video also give the "
    "GPU less work at a time."
)

#: Pattern of an error's message, kind of error to raise, its message and what to do. MLX stores an
#: error of the GPU and raises it when the stream is used next or waited for: `mx.eval` may return
#: first, with arrays that were never written.
_DEVICE_ERRORS: tuple[tuple[str, type[MlxSoraError], str, str], ...] = (
    (
        r"greater than the maximum allowed buffer size",
        MemoryBudgetError,
        "an array is larger than the GPU allows",
        _SMALLER_ARRAYS,
    ),
    (
        r"\[metal::malloc\] Resource limit",
        MemoryBudgetError,
        "there are too many arrays at a time",
        _SMALLER_BUDGET,
    ),
    (
        r"kIOGPUCommandBufferCallbackErrorOutOfMemory|Insufficient Memory"
        r"|\[malloc(_or_wait)?\] Unable to allocate|std::bad_alloc"
        r"|cuda\w+.*(out of memory|cudaErrorMemoryAllocation)|CUDA_ERROR_OUT_OF_MEMORY",
        MemoryBudgetError,
        "out of memory",
        _SMALLER_BUDGET,
    ),
    (
        r"kIOGPUCommandBufferCallbackError(Timeout|ImpactingInteractivity|Hang)"
        r"|Caused GPU (Timeout|Hang) Error|Impacting Interactivity",
        MlxSoraError,
        "the system ended work that kept the GPU busy for too long",
        _SHORTER_WORK,
    ),
    (
        r"kIOGPUCommandBufferCallbackErrorInnocentVictim|victim of GPU error",
        MlxSoraError,
        "other work broke the GPU, and the system dropped this run's with it",
        "Start again; if it repeats, close what else uses the GPU, or restart the machine.",
    ),
    (
        r"kIOGPUCommandBufferCallbackErrorSubmissionsIgnored|causing prior/excessive GPU errors",
        MlxSoraError,
        "the GPU takes no more work from this process after earlier errors",
        f"Start again in a new process. {_SHORTER_WORK}",
    ),
)


def explain_device_error(error: BaseException, stage: str) -> MlxSoraError | None:
    """Return an error with advice for MLX's errors about memory and GPU time; None for others.

    stage: where `error` was raised.
    """
    text = " ".join(str(error).split())[:200]
    if isinstance(error, MemoryError):
        return MemoryBudgetError(f"Stage {stage}: out of memory.", _SMALLER_BUDGET)
    for pattern, kind, message, fix in _DEVICE_ERRORS:
        if isinstance(error, RuntimeError) and re.search(pattern, text):
            return kind(f"Stage {stage}: {message} ({text.rstrip('.')}).", fix)
    return None
