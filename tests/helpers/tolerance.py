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
    return tolerance if _default_device() == mx.cpu else max(10 * tolerance, 1e-4)
