"""A fast BLAS for MLX's CPU backend on Linux.

The Linux wheel of MLX carries netlib's reference BLAS: one thread, no SIMD, about 40 times slower
than the processor can. The dynamic linker takes `cblas_sgemm` from whichever library was loaded
globally first, so `install` (called by `mlx_sora/__init__.py`) puts a better one there before
`mlx.core` is loaded: the OpenBLAS inside numpy's wheel, through the small extension `_cblas.c`,
else an installed MKL or OpenBLAS. The threads are then the library's: OPENBLAS_NUM_THREADS or
MKL_NUM_THREADS. `MLX_SORA_BLAS` picks a single way (`numpy`, `mkl`, `openblas`) or none (`off`).

macOS is left alone: MLX uses Accelerate there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from sysconfig import get_config_var

log = logging.getLogger(__name__)

#: Names under which numpy's wheels export the 64-bit functions, by age.
_NUMPY_SYMBOLS = ("scipy_cblas_{}gemm64_", "cblas_{}gemm64_")

_INSTALL_HINT = "install a C compiler and reinstall mlx_sora, or `apt install libopenblas0-pthread`"


@dataclass(frozen=True)
class Blas:
    """Which library multiplies MLX's float32 matrices on the CPU.

    name: for people; path: the library's file, empty where MLX's own is used.
    fast: False only for the reference BLAS; notice: then one line that says what to do about it.
    """

    name: str
    path: str = ""
    fast: bool = True
    notice: str = ""
    _shim: ctypes.CDLL | None = field(default=None, repr=False, compare=False)

    def call_count(self) -> int | None:
        """Matrix products that went through mlx_sora's extension so far; None for other ways."""
        return int(self._shim.mlx_sora_blas_calls()) if self._shim is not None else None


@cache
def install() -> Blas:
    """Put a fast BLAS in front of MLX's own, once per process; about 3 ms. Never raises."""
    if sys.platform != "linux":
        return Blas("MLX's own")
    choice = os.environ.get("MLX_SORA_BLAS", "auto")
    if choice not in ("auto", "off", *_WAYS):
        valid = ", ".join(("auto", *_WAYS, "off"))
        log.warning("MLX_SORA_BLAS=%s is unknown and ignored; it takes %s.", choice, valid)
        choice = "auto"
    if choice == "off":
        return Blas("MLX's own", fast=False, notice="MLX_SORA_BLAS=off: the CPU will be slow.")
    if "mlx.core" in sys.modules:
        return _too_late()
    for name, load in _WAYS.items():
        if choice in ("auto", name) and (blas := load()) is not None:
            return blas
    hint = _INSTALL_HINT
    if platform.machine() == "x86_64":
        hint += ", or `pip install mkl`"
    notice = f"No fast BLAS found, matrix products are about 40 times slower: {hint}."
    return Blas("MLX's own", fast=False, notice=notice)


def _too_late() -> Blas:
    import mlx.core as mx

    notice = "mlx.core was imported first, too late for a fast BLAS: import mlx_sora before it."
    if mx.default_device() == mx.Device(mx.cpu):
        log.warning(notice)
    return Blas("MLX's own", fast=False, notice=notice)


def _numpy_openblas() -> Blas | None:
    """OpenBLAS of numpy's wheel (64-bit integers), through the extension."""
    shim_path = Path(__file__).with_name(f"_cblas{get_config_var('EXT_SUFFIX')}")
    spec = importlib.util.find_spec("numpy")
    if not shim_path.is_file() or spec is None or spec.origin is None:
        return None
    # Found beside the package without importing it: `import mlx_sora` stays light.
    for path in (Path(spec.origin).parents[1] / "numpy.libs").glob("*openblas64_*.so*"):
        library = _open(path)
        addresses = _addresses(library) if library is not None else None
        shim = _open(shim_path, ctypes.RTLD_GLOBAL) if addresses is not None else None
        if addresses is None or shim is None:
            continue
        shim.mlx_sora_blas_calls.restype = ctypes.c_uint64
        shim.mlx_sora_blas_bind.argtypes = [ctypes.c_void_p] * 3
        shim.mlx_sora_blas_bind(*addresses)
        return Blas("OpenBLAS of numpy", str(path), _shim=shim)
    return None


def _addresses(library: ctypes.CDLL) -> list[int | None] | None:
    """Addresses of the single, double and complex product, or None where names are others."""
    for template in _NUMPY_SYMBOLS:
        names = [template.format(kind) for kind in "sdc"]
        if all(hasattr(library, name) for name in names):
            return [ctypes.cast(getattr(library, n), ctypes.c_void_p).value for n in names]
    return None


def _mkl() -> Blas | None:
    return _first("MKL", _installed("libmkl_rt.so*"), ("libmkl_rt.so.3", "libmkl_rt.so.2"))


def _system_openblas() -> Blas | None:
    return _first("OpenBLAS", _installed("libopenblas.so*"), ("libopenblas.so.0",))


def _installed(pattern: str) -> Iterator[Path]:
    yield from sorted((Path(sys.prefix) / "lib").glob(pattern))


def _first(name: str, files: Iterator[Path], sonames: tuple[str, ...]) -> Blas | None:
    """First library that loads and exports cblas_sgemm: files, then names the linker knows."""
    for candidate in (*map(str, files), *sonames):
        # Looked at privately first: a library without the function must not become global.
        probe = _open(candidate)
        if probe is not None and hasattr(probe, "cblas_sgemm"):
            _open(candidate, ctypes.RTLD_GLOBAL)
            return Blas(name, candidate)
    return None


def _open(path: str | Path, mode: int = ctypes.RTLD_LOCAL) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path), mode=mode)
    except OSError as error:
        log.debug("cannot load %s: %s", path, error)
        return None


_WAYS: dict[str, Callable[[], Blas | None]] = {
    "numpy": _numpy_openblas,
    "mkl": _mkl,
    "openblas": _system_openblas,
}
