"""The one part of the build that depends on the system; pyproject.toml holds all else.

On Linux an extension gives MLX's CPU backend the OpenBLAS that numpy ships (runtime/blas.py). It is
optional: without a compiler the install succeeds and the engine looks for another library. macOS
has Accelerate, and asking for its compiler can open a dialog that an installation would wait for.
"""

from __future__ import annotations

import sys

from setuptools import Extension, setup

CBLAS = Extension("mlx_sora.runtime._cblas", ["mlx_sora/runtime/_cblas.c"], optional=True)

setup(ext_modules=[CBLAS] if sys.platform == "linux" else [])
