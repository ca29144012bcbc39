"""MLX's errors about memory and the GPU's watchdog, as errors that say what to do.

Texts as found in MLX's source and its users' reports: `[malloc_or_wait]` and `[malloc] Unable to
allocate` (mlx/allocator.cpp), `[metal::malloc]` for an array beyond Metal's largest buffer and for
too many buffers (mlx/backend/metal/allocator.cpp), command buffers that fail (ml-explore/mlx#479)
for lack of memory or because the watchdog ended them (ml-explore/mlx#3267), CUDA's "out of memory".
Metal reports some command buffers from a thread of its own, which ends the process before Python
hears of it; and MLX's CPU backend does not look whether it was given memory.
"""

from __future__ import annotations

import re

from mlx_sora.errors import MemoryBudgetError, MlxSoraError

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


def known_error(error: BaseException, stage: str) -> MlxSoraError | None:
    """What `error`, raised in `stage`, means for the user; None where it is of another kind."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, MemoryError):
        return MemoryBudgetError(f"Stage {stage}: there is not enough memory.", _LESS)
    for pattern, kind, what, fix in _TABLE:
        if isinstance(error, RuntimeError) and re.search(pattern, text):
            return kind(f"Stage {stage}: {what} ({text.rstrip('.')}).", fix)
    return None
