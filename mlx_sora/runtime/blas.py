"""A fast BLAS for MLX's CPU backend on Linux.

The Linux wheel of MLX contains netlib's reference BLAS: one thread, no SIMD, about 40 times slower
than the processor. The dynamic linker takes `cblas_sgemm` from the first library that was loaded
globally, so `install` (called by `mlx_sora/__init__.py`) loads a faster one before `mlx.core`: the
OpenBLAS in numpy's wheel, through the small extension `_cblas.c`, else an installed MKL or
OpenBLAS. OPENBLAS_NUM_THREADS or MKL_NUM_THREADS then set the number of threads. `MLX_SORA_BLAS`
selects one library (`numpy`, `mkl`, `openblas`) or none (`off`). macOS has Accelerate and needs
nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from sysconfig import get_config_var

log = logging.getLogger(__name__)

#: Names under which numpy's wheels export the 64-bit functions, by age.
_NUMPY_SYMBOLS = ("scipy_cblas_{}gemm64_", "cblas_{}gemm64_")

_INSTALL_HINT = "install a C compiler and reinstall mlx_sora, or `apt install libopenblas0-pthread`"


@dataclass(frozen=True)
class Blas:
    """Library that multiplies MLX's float32 matrices on the CPU.

    path: file of the library; empty for MLX's own.
    fast: False for the reference BLAS.
    notice: then one line of advice.
    """

    name: str
    path: str = ""
    fast: bool = True
    notice: str = ""
    _shim: ctypes.CDLL | None = field(default=None, repr=False, compare=False)

    def call_count(self) -> int | None:
        """Return the number of matrix products of mlx_sora's extension; None without it."""
        return int(self._shim.mlx_sora_blas_calls()) if self._shim is not None else None


@cache
def install() -> Blas:
    """Load a fast BLAS before MLX's own, once per process; about 3 ms. Never raises."""
    if sys.platform != "linux":
        return Blas("MLX's own")
    choice = os.environ.get("MLX_SORA_BLAS", "auto")
    if choice not in ("auto", "off", *_LOADERS):
        valid = ", ".join(("auto", *_LOADERS, "off"))
        log.warning("MLX_SORA_BLAS=%s is unknown and ignored; it takes %s.", choice, valid)
        choice = "auto"
    if choice == "off":
        return Blas("MLX's own", fast=False, notice="MLX_SORA_BLAS=off: the CPU will be slow.")
    if "mlx.core" in sys.modules:
        return _mlx_loaded_first()
    for name, load in _LOADERS.items():
        if choice in ("auto", name) and (blas := load()) is not None:
            return blas
    hint = _INSTALL_HINT
    if platform.machine() == "x86_64":
        hint += ", or `pip install mkl`"
    notice = f"No fast BLAS found, matrix products are about 40 times slower: {hint}."
    return Blas("MLX's own", fast=False, notice=notice)


def _mlx_loaded_first() -> Blas:
    import mlx.core as mx

    notice = "mlx.core was imported first, too late for a fast BLAS: import mlx_sora before it."
    if mx.default_device() == mx.Device(mx.cpu):
        log.warning(notice)
    return Blas("MLX's own", fast=False, notice=notice)


def _numpy_openblas() -> Blas | None:
    """Bind the OpenBLAS of numpy's wheel (64-bit integers) to the extension."""
    shim_path = Path(__file__).with_name(f"_cblas{get_config_var('EXT_SUFFIX')}")
    spec = importlib.util.find_spec("numpy")
    if not shim_path.is_file() or spec is None or spec.origin is None:
        return None
    # Does not import numpy: `import mlx_sora` stays light.
    folder = Path(spec.origin).parents[1] / "numpy.libs"
    for name in ("libquadmath*", "libgfortran*"):  # OpenBLAS of numpy 1.26 cannot find them itself
        for path in folder.glob(name):
            _load(path)
    for path in folder.glob("*openblas64_*.so*"):
        library = _load(path)
        addresses = _addresses(library) if library is not None else None
        shim = _load(shim_path, ctypes.RTLD_GLOBAL) if addresses is not None else None
        if addresses is None or shim is None:
            continue
        shim.mlx_sora_blas_calls.restype = ctypes.c_uint64
        shim.mlx_sora_blas_bind.argtypes = [ctypes.c_void_p] * 3
        shim.mlx_sora_blas_bind(*addresses)
        return Blas("OpenBLAS of numpy", str(path), _shim=shim)
    return None


def _addresses(library: ctypes.CDLL) -> list[int | None] | None:
    """Return the addresses of the single, double and complex product, or None if not exported."""
    for template in _NUMPY_SYMBOLS:
        names = [template.format(kind) for kind in "sdc"]
        if all(hasattr(library, name) for name in names):
            return [ctypes.cast(getattr(library, n), ctypes.c_void_p).value for n in names]
    return None


def _load_first(name: str, pattern: str, *sonames: str) -> Blas | None:
    """Load the first library with cblas_sgemm: of sys.prefix, then of the linker's names."""
    files = sorted((Path(sys.prefix) / "lib").glob(pattern))
    for candidate in (*map(str, files), *sonames):
        # Probe it locally first: a library without the function must not become global.
        probe = _load(candidate)
        if probe is not None and hasattr(probe, "cblas_sgemm"):
            _load(candidate, ctypes.RTLD_GLOBAL)
            return Blas(name, candidate)
    return None


def _load(path: str | Path, mode: int = ctypes.RTLD_LOCAL) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path), mode=mode)
    except OSError as error:
        log.debug("cannot load %s: %s", path, error)
        return None


_LOADERS: dict[str, Callable[[], Blas | None]] = {
    "numpy": _numpy_openblas,
    "mkl": partial(_load_first, "MKL", "libmkl_rt.so*", "libmkl_rt.so.3", "libmkl_rt.so.2"),
    "openblas": partial(_load_first, "OpenBLAS", "libopenblas.so*", "libopenblas.so.0"),
}
