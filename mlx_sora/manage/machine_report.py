"""The report of `doctor --machine`: all checks of this machine, and the facts for a bug report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from mlx_sora.manage.machine_check import SECONDS, Allowance, CheckResult, check_form
from mlx_sora.manage.machine_engine import MLX_CHECKS
from mlx_sora.manage.machine_forms import FORMS
from mlx_sora.manage.machine_networks import NETWORKS, check_video
from mlx_sora.runtime.device import describe_machine

#: Variables of the environment that change how MLX computes.
SWITCHES = ("MLX_ENABLE_TF32", "MLX_CONV_WINOGRAD", "MLX_CONV_WINOGRAD_TILE_BATCH")

#: All checks, in order. A check gets its allowance and yields its results.
CHECKS: tuple[Callable[[Allowance], Iterator[CheckResult]], ...] = (
    *MLX_CHECKS,
    *(partial(check_form, form) for form in (*FORMS, *NETWORKS)),
    check_video,
)


def diagnose_machine(seconds: float = SECONDS) -> Iterator[CheckResult]:
    """Check this machine; yield results as they are found.

    seconds: of the CPU that a check may take, by which its size is chosen.
    """
    allowance = Allowance.measure(seconds)
    for check in CHECKS:
        yield from check(allowance)


def machine_report(results: Sequence[CheckResult]) -> dict[str, Any]:
    """Return machine, switches of the environment and results, as JSON values."""
    return {
        "machine": describe_machine(),
        "switches": {name: os.environ.get(name) for name in SWITCHES},
        "results": [result.to_dict() for result in results],
    }
