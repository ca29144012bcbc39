"""Environment variables of MLX that change results or memory, and the engine's defaults for them.

MLX reads them when it is first used, so `mlx_sora/__init__.py` sets the defaults. A value of the
user's stays.
"""

from __future__ import annotations

import os

#: MLX_ENABLE_TF32=0: float32 products are float32. By default they keep 10 bits of mantissa on M5,
#: A19 and NVIDIA GPUs, and Metal's Winograd convolutions turn that into errors of 1 % in the VAE.
#: MLX_CONV_WINOGRAD_TILE_BATCH=1: these convolutions take one image at a time. By default Metal
#: holds the scratch space of all frames, up to 19 times the tensor (mlx/backend/metal/conv.cpp).
DEFAULTS = {"MLX_ENABLE_TF32": "0", "MLX_CONV_WINOGRAD_TILE_BATCH": "1"}

#: Reported too; without defaults.
_OTHERS = ("MLX_CONV_WINOGRAD", "MLX_CONV_WINOGRAD_WORKING_SET")


def set_defaults() -> None:
    """Set the variables of DEFAULTS that the environment does not have."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def switches() -> dict[str, str]:
    """Return the variables that are set, with their values."""
    return {name: os.environ[name] for name in (*DEFAULTS, *_OTHERS) if name in os.environ}
