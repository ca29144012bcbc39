"""The device MLX runs on: its precision, its memory, its errors, and a description of it."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_sora.errors import MemoryBudgetError, MlxSoraError, UsageError
from mlx_sora.models.precision import Precision, dtype_name
from mlx_sora.request.generation import DTYPES, FLOAT_DTYPES
from mlx_sora.runtime import blas
from mlx_sora.runtime.switches import switches
from mlx_sora.utils.versions import versions

if TYPE_CHECKING:
    import numpy as np

#: Seconds of a matrix product on a Linux CPU over those of float32, where MLX uses BLAS.
_SLOWDOWN = {"bfloat16": 18, "float16": 23}


def choose_precision(
    dtype: str = "auto", vae_dtype: str = "float32", device: mx.Device | None = None
) -> Precision:
    """Return the type of each network on `device` (default: MLX's default device).

    dtype: of the transformer and of T5; with float16, in which T5 overflows, T5 has that of auto.
    Raises UsageError for unknown names, and for half precision on a Linux CPU.
    """
    transformer = default_dtype(device, dtype)
    text_encoder = default_dtype(device) if transformer == mx.float16 else transformer
    if vae_dtype not in FLOAT_DTYPES:
        valid = ", ".join(FLOAT_DTYPES)
        raise UsageError(f"Unknown VAE dtype {vae_dtype!r}.", f"Choose one of: {valid}.")
    if vae_dtype != "float32" and _is_linux_cpu(device):
        raise UsageError(
            f"A VAE in {vae_dtype} is slower than in float32 on a Linux CPU, in no less memory.",
            "Use --vae-dtype float32, or a GPU.",
        )
    return Precision(text_encoder, transformer, getattr(mx, vae_dtype))


def default_dtype(device: mx.Device | None = None, requested: str = "auto") -> mx.Dtype:
    """Return the type of the transformer on `device` (default: MLX's default device).

    auto: bfloat16 on GPUs, float32 on CPUs. Raises UsageError for unknown names and for half
    precision on a Linux CPU, where MLX multiplies it without BLAS.
    """
    if requested not in DTYPES:
        raise UsageError(f"Unknown dtype {requested!r}.", f"Choose one of: {', '.join(DTYPES)}.")
    if requested in _SLOWDOWN and _is_linux_cpu(device):
        raise UsageError(
            f"{requested} is about {_SLOWDOWN[requested]} times slower than float32 on a Linux "
            "CPU.",
            "Use --dtype float32 or auto, or a GPU.",
        )
    if requested == "auto":
        return mx.float32 if _is_cpu(device) else mx.bfloat16
    return getattr(mx, requested)  # type: ignore[no-any-return]


def _is_cpu(device: mx.Device | None) -> bool:
    return bool((device or mx.default_device()) == mx.Device(mx.cpu))


def _is_linux_cpu(device: mx.Device | None) -> bool:
    return sys.platform == "linux" and _is_cpu(device)


def backend() -> str:
    """Return `metal`, `cuda` or `cpu`, the backend of MLX's default device."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def blas_notice() -> str:
    """Return one line for users of a CPU without a fast BLAS; empty for others."""
    return blas.install().notice if backend() == "cpu" else ""


def to_numpy(array: mx.array) -> np.ndarray:
    """Return an array as a numpy array.

    It is evaluated first: numpy passes over the error of a read that failed, and takes what was in
    memory for its result.
    """
    import numpy as np

    mx.eval(array)
    return np.array(array)


def total_memory() -> int:
    """Return the bytes of RAM of the machine, or the limit of its container if that is lower."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return memory


def gpu_memory() -> int | None:
    """Return the bytes that the GPU uses without paging; None on CPUs."""
    if backend() == "cpu":
        return None
    info = mx.device_info()
    memory = info.get("max_recommended_working_set_size", info.get("total_memory"))
    return None if memory is None else int(memory)


def largest_array() -> int | None:
    """Return the most bytes that one array may have; None where nothing limits it."""
    limit = mx.device_info().get("max_buffer_length") if backend() == "metal" else None
    return None if limit is None else int(limit)


def describe_device() -> dict[str, str]:
    """Return the device on which roundings depend: backend, processor and file of the BLAS."""
    return {
        "backend": backend(),
        "device": str(mx.device_info().get("device_name", platform.processor())),
        "blas_library": Path(blas.install().path).name,
    }


def describe_machine() -> dict[str, object]:
    """Return JSON values for `info` and metadata: sizes in bytes, no paths."""
    library = blas.install()
    return {
        **describe_device(),
        "dtype": dtype_name(default_dtype()),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "memory": total_memory(),
        "blas": library.name,
        "blas_fast": library.fast,
        "mlx_switches": switches(),
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
        r"greater than the maximum allowed buffer size|exceeds the maximum Metal buffer size",
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
    (
        r"\[Compile::eval_cpu\]|Could not load C\+\+ shared library",
        MlxSoraError,
        "MLX cannot compile a function",
        "Set TMPDIR to a folder of yours with room, or MLX_DISABLE_COMPILE=1 to do without.",
    ),
)


def explain_device_error(error: BaseException, stage: str) -> MlxSoraError | None:
    """Return an error with advice for MLX's errors of memory, GPU time and compiler; or None.

    stage: where `error` was raised.
    """
    text = " ".join(str(error).split())[:200]
    if isinstance(error, MemoryError):
        return MemoryBudgetError(f"Stage {stage}: out of memory.", _SMALLER_BUDGET)
    for pattern, kind, message, fix in _DEVICE_ERRORS:
        if isinstance(error, RuntimeError) and re.search(pattern, text):
            return kind(f"Stage {stage}: {message} ({text.rstrip('.')}).", fix)
    return None
