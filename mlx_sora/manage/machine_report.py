"""The report of `doctor --machine`: all checks of this machine, and the facts for a bug report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from mlx_sora.manage.machine_check import (
    SECONDS,
    Allowance,
    CheckResult,
    check_form,
    failed_result,
)
from mlx_sora.manage.machine_engine import MLX_CHECKS
from mlx_sora.manage.machine_forms import FORMS
from mlx_sora.manage.machine_networks import NETWORKS, check_video
from mlx_sora.runtime.device import describe_machine

#: Variables of the environment that change how MLX computes.
SWITCHES = ("MLX_ENABLE_TF32", "MLX_CONV_WINOGRAD", "MLX_CONV_WINOGRAD_TILE_BATCH")

#: All checks by name, in order. A check gets its allowance and yields its results.
CHECKS: dict[str, Callable[[Allowance], Iterator[CheckResult]]] = {
    **MLX_CHECKS,
    **{form.name: partial(check_form, form) for form in (*FORMS, *NETWORKS)},
    "whole video": check_video,
}


def diagnose_machine(seconds: float = SECONDS) -> Iterator[CheckResult]:
    """Check this machine; yield results as they are found. An error becomes a result.

    seconds: of the CPU that a check may take, by which its size is chosen.
    """
    allowance = Allowance.measure(seconds)
    for name, check in CHECKS.items():
        try:
            yield from check(allowance)
        except Exception as error:
            yield failed_result(name, error)


def machine_report(results: Sequence[CheckResult]) -> dict[str, Any]:
    """Return machine, switches of the environment and results, as JSON values."""
    return {
        "machine": describe_machine(),
        "switches": {name: os.environ.get(name) for name in SWITCHES},
        "results": [result.to_dict() for result in results],
    }
