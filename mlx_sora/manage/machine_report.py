"""The report of `doctor --machine`: this machine's facts, the results of all checks, its speeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from mlx_sora.errors import MlxSoraError
from mlx_sora.manage.machine_check import (
    OK,
    SECONDS,
    SKIPPED,
    SLOW,
    Allowance,
    CheckResult,
    check_form,
    failed_result,
)
from mlx_sora.manage.machine_engine import MLX_CHECKS
from mlx_sora.manage.machine_file import write_speeds
from mlx_sora.manage.machine_forms import FORMS
from mlx_sora.manage.machine_networks import NETWORKS, check_video
from mlx_sora.manage.machine_speed import OnProgress, measure_speeds
from mlx_sora.manage.speed_report import speed_rows
from mlx_sora.manage.video_report import estimate_videos
from mlx_sora.memory.speeds import MachineSpeeds
from mlx_sora.runtime.device import describe_machine

#: All checks by name, in order. A check gets its allowance and yields its results.
CHECKS: dict[str, Callable[[Allowance], Iterator[CheckResult]]] = {
    **MLX_CHECKS,
    **{form.name: partial(check_form, form) for form in (*FORMS, *NETWORKS)},
    "whole video": check_video,
}


@dataclass
class MachineReport:
    """Results so far, and speeds once they are measured.

    seconds: of the CPU that a check may take, by which its size is chosen.
    """

    seconds: float = SECONDS
    results: list[CheckResult] = field(default_factory=list)
    speeds: MachineSpeeds | None = None

    def run(self, on_progress: OnProgress = lambda _: None) -> Iterator[CheckResult]:
        """Check this machine, then measure it; yield results as they are found.

        An error becomes a result. on_progress: gets the name of what is measured.
        """
        for result in chain(self._check(), self._measure(on_progress)):
            self.results.append(result)
            yield result

    def _check(self) -> Iterator[CheckResult]:
        allowance = Allowance.measure(self.seconds)
        for name, check in CHECKS.items():
            start = time.perf_counter()
            try:
                yield from check(allowance)
            except Exception as error:
                yield failed_result(name, error)
            if name not in MLX_CHECKS:
                allowance = allowance.after(time.perf_counter() - start, self.seconds)

    def _measure(self, on_progress: OnProgress) -> Iterator[CheckResult]:
        """Measure the speeds of this machine and keep them for estimates."""
        try:
            self.speeds = measure_speeds(on_progress)
        except Exception as error:
            yield failed_result("speeds", error)
            return
        yield from speed_rows(self.speeds)
        try:
            path = write_speeds(self.speeds)
        except MlxSoraError as error:
            yield CheckResult("machine file", SLOW, error.message, advice=error.fix)
        else:
            message = f"{path} has the speeds, by which --dry-run and bench foresee seconds"
            yield CheckResult("machine file", OK, message)
        yield from _videos(self.speeds)

    def to_dict(self) -> dict[str, Any]:
        """Return machine, results and speeds as JSON values."""
        return {
            "machine": describe_machine(),
            "results": [result.to_dict() for result in self.results],
            "speeds": None if self.speeds is None else self.speeds.to_dict(),
        }


def _videos(speeds: MachineSpeeds) -> Iterator[CheckResult]:
    """Estimate videos of the published model, which need not be downloaded."""
    try:
        for video in estimate_videos(speeds):
            status = SKIPPED if video.seconds is None else OK
            yield CheckResult(f"estimate, {video.name}", status, str(video))
    except Exception as error:
        yield failed_result("estimates", error)
