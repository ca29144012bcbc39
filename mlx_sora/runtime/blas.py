"""A fast BLAS for MLX's CPU backend on Linux.

The Linux wheel of MLX contains netlib's reference BLAS: one thread, no SIMD, about 40 times slower
than the processor. The dynamic linker takes `cblas_sgemm` from the first library that was loaded
globally, so `install` (called by `mlx_sora/__init__.py`) loads a faster one before `mlx.core`: the
OpenBLAS in numpy's wheel, through the small extension `_cblas.c`, else an installed MKL or
OpenBLAS. OPENBLAS_NUM_THREADS or MKL_NUM_THREADS then set the number of threads; without it, that
of numpy's OpenBLAS follows what other programs leave free.
`MLX_SORA_BLAS` selects one library (`numpy`, `mkl`, `openblas`) or none (`off`). macOS has
Accelerate and needs nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from sysconfig import get_config_var

log = logging.getLogger(__name__)

#: Names under which numpy's wheels export the 64-bit functions, by age.
_NUMPY_SYMBOLS = ("scipy_cblas_{}gemm64_", "cblas_{}gemm64_")

#: Names of its functions of the number of threads, likewise.
_THREAD_SYMBOLS = ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_")

#: Variables with which a user sets the number of OpenBLAS's threads.
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")

#: Fields of /proc/stat, in ticks: user, nice, system, irq, softirq and steal; idle and iowait.
_BUSY, _IDLE = (0, 1, 2, 5, 6, 7), (3, 4)

#: Least time between two readings, in ticks of each processor.
_LEAST = 10

_INSTALL_HINT = "install a C compiler and reinstall mlx_sora, or `apt install libopenblas0-pthread`"


class Processors:
    """Processors that this process may use, and what other programs leave free of them.

    stat: the file of the system's counters.
    """

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat, self._last = stat, (0.0, 0.0, 0.0)
        with suppress(OSError, ValueError, AttributeError):
            self._last = self._read()

    def free(self) -> float | None:
        """Return how many were free on average since the last call; None if that is not known."""
        try:
            now = self._read()
        except (OSError, ValueError, AttributeError):
            return None
        busy, total, own = (after - before for after, before in zip(now, self._last, strict=True))
        count = len(os.sched_getaffinity(0))
        if total < _LEAST * count:
            return None
        self._last = now
        return count * (1 - max(0.0, busy - own) / total)

    def _read(self) -> tuple[float, float, float]:
        """Return ticks that were busy, all, and those of this process."""
        usable = os.sched_getaffinity(0)
        busy, total = 0, 0
        for line in self._stat.read_text().splitlines():
            name, *fields = line.split()
            if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in usable:
                ticks = list(map(int, fields))
                busy += sum(ticks[i] for i in _BUSY)
                total += sum(ticks[i] for i in (*_BUSY, *_IDLE))
        times = os.times()
        return busy, total, (times.user + times.system) * os.sysconf("SC_CLK_TCK")


@dataclass
class AdaptiveThreads:
    """Number of threads of a library: the processors that are free.

    OpenBLAS divides each product evenly and waits for the slowest thread. Where another program has
    one of the processors, each product waits until the scheduler gives it back: with both of two
    processors busy, a video took ten times as long with two threads as with one
    (benchmarks/blas_threads.py).

    read, write: the library's functions. processors: their load. most: threads of a free machine.
    """

    read: Callable[[], int]
    write: Callable[[int], object]
    processors: Processors = field(default_factory=Processors)

    def __post_init__(self) -> None:
        self.most = self._own = self.read()

    def adapt(self) -> None:
        """Use as many threads as processors were free since the last call, if nobody set others."""
        if self.most == 1 or self.read() != self._own:
            return
        free = self.processors.free()
        if free is None:
            return
        wanted = max(1, min(self.most, round(free)))
        if wanted != self._own:
            log.info("BLAS: %d of %d threads; %.1f processors are free", wanted, self.most, free)
            self.write(wanted)
            self._own = wanted


@dataclass(frozen=True)
class Blas:
    """Library that multiplies MLX's float32 matrices on the CPU.

    path: file of the library; empty for MLX's own.
    fast: False for the reference BLAS.
    notice: then one line of advice. threads: None if their number is the user's.
    """

    name: str
    path: str = ""
    fast: bool = True
    notice: str = ""
    threads: AdaptiveThreads | None = field(default=None, repr=False, compare=False)
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


def adapt_threads() -> None:
    """Let the number of threads follow the load of the machine, unless the user sets it."""
    threads = install().threads
    if threads is not None:
        threads.adapt()


def _mlx_loaded_first() -> Blas:
    import mlx.core as mx

    notice = "mlx.core was imported first, too late for a fast BLAS: import mlx_sora before it."
    if mx.default_device() == mx.Device(mx.cpu):
        log.warning(notice)
    return Blas("MLX's own", fast=False, notice=notice)


def _numpy_openblas() -> Blas | None:
    """Bind the OpenBLAS of numpy's wheel (64-bit integers) to the extension."""
    file = Path(__file__).with_name(f"_cblas{get_config_var('EXT_SUFFIX')}")
    # In a clone Python imports the clone's modules; `pip install .` compiled beside installed ones.
    installed = (Path(entry) / "mlx_sora" / "runtime" / file.name for entry in sys.path)
    shim_path = next((path for path in (file, *installed) if path.is_file()), None)
    spec = importlib.util.find_spec("numpy")
    if shim_path is None or spec is None or spec.origin is None:
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
        return Blas("OpenBLAS of numpy", str(path), threads=_adaptive_threads(library), _shim=shim)
    return None


def _adaptive_threads(library: ctypes.CDLL | None) -> AdaptiveThreads | None:
    """Return the number of threads of an OpenBLAS; None if the user sets it."""
    if any(os.environ.get(name) for name in _THREAD_VARIABLES):
        return None
    for symbol in _THREAD_SYMBOLS:
        read, write = (getattr(library, symbol.format(verb), None) for verb in ("get", "set"))
        if read is not None and write is not None:
            return AdaptiveThreads(read, write)
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
