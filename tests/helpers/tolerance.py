"""Tolerances that follow the device which computes."""

from __future__ import annotations

import mlx.core as mx

#: MLX's own answer, also where `--emulate-gpu` replaces it.
_default_device = mx.default_device


def rounding(tolerance: float) -> float:
    """Return `tolerance` of float32 results on a CPU; tenfold, and at least 1e-4, on a GPU.

    GPUs add in another order, choose algorithms by size, and Metal's sines are exact to 2^-13. An
    emulated GPU computes on the CPU.
    """
    return max(10 * tolerance, 1e-4) if on_real_gpu() else tolerance


def on_real_gpu() -> bool:
    """Return True if MLX computes on a GPU, not emulated.

    There, memory is freed some time after the work that used it, and CUDA's is not the process's.
    """
    return bool(_default_device() != mx.Device(mx.cpu))
