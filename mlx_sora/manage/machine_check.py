"""Checks of forms that depend on the backend against float32 on the CPU, in the same process.

A form runs on the same numbers twice: on the device under test in each type, and in float32 on the
CPU with the forms of CPUs. Without a GPU the device under test is the CPU with the forms of GPUs,
which are MLX's own kernels there. The difference is compared with the error expected of the type.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import mlx.core as mx

from mlx_sora.errors import MemoryBudgetError
from mlx_sora.memory.limits import memory_scope
from mlx_sora.models import ops
from mlx_sora.models.precision import dtype_name
from mlx_sora.runtime.device import backend, explain_device_error, gpu_memory, total_memory

OK, SLOW, WRONG, SKIPPED = "ok", "slow", "wrong", "skipped"

#: Seconds of the CPU that a check may take, by which its size is chosen.
SECONDS = 0.8

#: A form that takes more seconds than this on a GPU, and twice as long as on the CPU, is slow.
_SLOW_SECONDS, _SLOW_RATIO = 0.2, 2

#: MLX's products in half precision on a CPU take this many times as long as in float32.
_HALF_SLOWDOWN = 20

#: A check of all types takes up to this many times the seconds that its size was chosen by.
_PATIENCE = 4

REPORT = (
    "Update MLX (pip install -U mlx). If it stays, open an issue with the output of "
    "python -m mlx_sora doctor --machine --json."
)

BUSY = "Close other programs and check again."

TYPES = (mx.float32, mx.bfloat16, mx.float16)


def type_advice(dtype: mx.Dtype, option: str = "--dtype") -> str:
    """Return advice for a form that is wrong in a type. option: chooses the type."""
    return REPORT if dtype == mx.float32 else f"Run with {option} float32. {REPORT}"


@dataclass(frozen=True)
class CheckResult:
    """Row of the report.

    status: ok, slow, wrong or skipped. error: difference from the reference; bound: the largest
    that is expected. seconds: on the device under test. advice: what to do.
    """

    name: str
    status: str
    message: str
    error: float | None = None
    bound: float | None = None
    seconds: float | None = None
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """A form with numbers to run on.

    run: gets `inputs`, floats in the type under test, then `constants` as they are.
    """

    run: Callable[..., mx.array]
    inputs: Sequence[mx.array]
    constants: Sequence[mx.array] = ()


@dataclass(frozen=True)
class Form:
    """A form to check.

    make: builds its case, from the share of the published size, 1 or less. gflop, gigabytes: work
    and memory at the published size. float32, half: largest expected error in epsilons of the type.
    advice: what to do where a type is wrong.
    """

    name: str
    make: Callable[[float], Case]
    gflop: float
    gigabytes: float
    float32: float
    half: float
    types: Sequence[mx.Dtype] = TYPES
    advice: Callable[[mx.Dtype], str] = type_advice

    def bound(self, dtype: mx.Dtype) -> float:
        """Return the largest expected error in a type."""
        epsilons = self.float32 if dtype == mx.float32 else self.half
        return epsilons * float(mx.finfo(dtype).eps)


@dataclass(frozen=True)
class Allowance:
    """Work and memory of one check. flops: in float32 on the CPU; memory: bytes."""

    flops: float
    memory: float

    @classmethod
    def measure(cls, seconds: float = SECONDS) -> Allowance:
        """Allow a check `seconds` of this CPU and a third of the memory."""
        memory = min(total_memory(), gpu_memory() or total_memory())
        return cls(seconds * _cpu_speed(), memory / 3)

    def scale(self, form: Form, dtype: mx.Dtype) -> float:
        """Return the share of its published size at which a form is checked."""
        slow = dtype != mx.float32 and backend() == "cpu"
        flops = self.flops / (_HALF_SLOWDOWN if slow else 1)
        return min(1.0, flops / (form.gflop * 1e9), self.memory / (form.gigabytes * 1e9))

    def after(self, seconds: float, expected: float = SECONDS) -> Allowance:
        """Return the allowance after a check of `seconds`: less if it took far more than expected.

        Products say little of a CPU whose other operations are slow, or with many busy threads.
        """
        share = min(1.0, _PATIENCE * expected / seconds)
        return replace(self, flops=self.flops * share, memory=self.memory * share)


def _cpu_speed() -> float:
    """Return the float32 operations per second of a matrix product on the CPU."""
    side = 1024
    with mx.stream(mx.cpu):
        x = mx.ones((side, side))
        mx.eval(x @ x)
        start = time.perf_counter()
        mx.eval(x @ x @ x)
        return 4 * side**3 / (time.perf_counter() - start)


def check_form(form: Form, allowance: Allowance) -> Iterator[CheckResult]:
    """Check a form in each of its types; yield a result for each."""
    for scale, dtypes in groupby(form.types, lambda dtype: allowance.scale(form, dtype)):
        with memory_scope():
            case = form.make(scale)
            with reference_device():
                expected, cpu_seconds = _run(case, mx.float32)
            for dtype in dtypes:
                yield _compare(form, dtype, scale, case, expected, cpu_seconds)
            del case, expected


def _compare(
    form: Form, dtype: mx.Dtype, scale: float, case: Case, expected: mx.array, cpu_seconds: float
) -> CheckResult:
    name = f"{form.name}, {dtype_name(dtype)}"
    try:
        with device_under_test():
            out, seconds = _run(case, dtype)
            if _is_slow(seconds, cpu_seconds):  # the first call may have compiled its kernels
                seconds = _run(case, dtype)[1]
            error = relative_error(out, expected)
    except Exception as caught:  # whatever it is, it is a result
        return failed_result(name, caught)
    bound = form.bound(dtype)
    number = error if math.isfinite(error) else None
    found = "NaN or Inf" if number is None else f"error {error:.1e}"
    message = f"{found}, at most {bound:.1e} expected"
    if scale < 1:
        message += f", at {100 * scale:.2g} % of the published size"
    if number is None or number > bound:
        return CheckResult(name, WRONG, message, number, bound, seconds, form.advice(dtype))
    if _is_slow(seconds, cpu_seconds):
        message = f"takes {seconds:.2f} s on the GPU and {cpu_seconds:.2f} s on the CPU"
        return CheckResult(name, SLOW, message, number, bound, seconds, f"{BUSY} {REPORT}")
    return CheckResult(name, OK, message, number, bound, seconds)


def _run(case: Case, dtype: mx.Dtype) -> tuple[mx.array, float]:
    """Return the output of a case in a type, and the seconds of it."""
    inputs = [x if x.dtype == mx.bool_ else x.astype(dtype) for x in case.inputs]
    mx.eval(inputs)
    mx.synchronize()
    start = time.perf_counter()
    out = case.run(*inputs, *case.constants)
    mx.eval(out)
    mx.synchronize()
    return out, time.perf_counter() - start


def _is_slow(seconds: float, cpu_seconds: float) -> bool:
    return backend() != "cpu" and seconds > max(_SLOW_RATIO * cpu_seconds, _SLOW_SECONDS)


def relative_error(out: mx.array, expected: mx.array) -> float:
    """Return the largest error of a row [.., C]: root mean squares of difference over `expected`.

    A row smaller than the average counts as average. Infinite for another shape, NaN and Inf.
    """
    with mx.stream(mx.cpu):
        out = out.astype(mx.float32)
        if out.shape != expected.shape or not mx.isfinite(out).all().item():
            return math.inf
        size = mx.square(expected).mean(axis=-1)
        error = mx.square(out - expected).mean(axis=-1) / mx.maximum(size, size.mean())
        return math.sqrt(error.max().item())  # type: ignore[arg-type]


def failed_result(name: str, error: Exception) -> CheckResult:
    """Return the row of a check that raised `error`: skipped where memory is too small."""
    known = explain_device_error(error, "check")
    reason = " ".join(str(error).split())[:200]
    if isinstance(known, MemoryBudgetError):
        return CheckResult(name, SKIPPED, f"not enough memory: {reason}")
    return CheckResult(name, WRONG, f"fails: {reason}", advice=known.fix if known else REPORT)


@contextmanager
def device_under_test() -> Iterator[None]:
    """Use the default device with the forms of GPUs."""
    with ops.use_forms(gpu=True):
        yield


@contextmanager
def reference_device() -> Iterator[None]:
    """Use the CPU with the forms of CPUs."""
    with mx.stream(mx.cpu), ops.use_forms(gpu=False):
        yield
