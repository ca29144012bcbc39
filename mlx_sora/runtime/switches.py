"""Environment variables that change results or memory, and the engine's defaults for them.

MLX reads them when it is first used, so `mlx_sora/__init__.py` sets the defaults. A value of the
user's stays.
"""

from __future__ import annotations

import os
import re

#: MLX_ENABLE_TF32=0: float32 products are float32. By default they keep 10 bits of mantissa on M5,
#: A19 and NVIDIA GPUs, and Metal's Winograd convolutions turn that into errors of 1 % in the VAE.
#: MLX_CONV_WINOGRAD_TILE_BATCH=1: these convolutions take one image at a time. By default Metal
#: holds the scratch space of all frames, up to 19 times the tensor (mlx/backend/metal/conv.cpp).
DEFAULTS = {"MLX_ENABLE_TF32": "0", "MLX_CONV_WINOGRAD_TILE_BATCH": "1"}

#: Recorded too; without defaults. Of MLX: forms of kernels on Metal, CUDA and CPUs. Of the BLAS:
#: library and kernels by processor. OpenBLAS rounds alike with 1 to 4 threads, MKL may not.
_OTHERS = (
    "MLX_CONV_WINOGRAD",
    "MLX_CONV_WINOGRAD_WORKING_SET",
    "MLX_CONV_UNFOLD_TILE_ROWS",
    "MLX_SDPA_BLOCKS",
    "MLX_METAL_GPU_ARCH",
    "MLX_CUDA_USE_CUDNN_SDPA",
    "NVIDIA_TF32_OVERRIDE",
    "MLX_DISABLE_COMPILE",
    "MLX_SORA_BLAS",
    "OPENBLAS_CORETYPE",
    "MKL_NUM_THREADS",
    "MKL_CBWR",
)

#: Values that may be shown: a record can be of anybody.
_PLAIN = re.compile(r"[\w.,+-]{1,40}", re.ASCII)


def set_defaults() -> None:
    """Set the variables of DEFAULTS that the environment does not have."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def switches() -> dict[str, str]:
    """Return the variables that are set, with their values."""
    return {name: os.environ[name] for name in (*DEFAULTS, *_OTHERS) if name in os.environ}


def missing_switches(recorded: object) -> list[str]:
    """Return what a recorded run had otherwise, as `NAME=value` or `no NAME`.

    recorded: value of `switches` in its record. With these set, the same device rounds the same.
    """
    if not isinstance(recorded, dict):
        return []
    now, missing = switches(), []
    for name in (*DEFAULTS, *_OTHERS):
        value = recorded.get(name)
        if value == now.get(name):
            continue
        if value is None:
            missing.append(f"no {name}")
        elif isinstance(value, str) and _PLAIN.fullmatch(value):
            missing.append(f"{name}={value}")
    return missing
