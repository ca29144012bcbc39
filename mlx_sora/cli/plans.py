"""`--dry-run`: the plan of a run, and the seconds it would take on a measured machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mlx_sora.cli.progress import Renderer, plan_table
from mlx_sora.runtime.events import Warned

if TYPE_CHECKING:
    from mlx_sora.distributed.group import Ranks
    from mlx_sora.memory.estimate import Estimate
    from mlx_sora.memory.plan import Plan
    from mlx_sora.memory.speeds import MachineSpeeds
    from mlx_sora.pipeline.pipeline import Pipeline
    from mlx_sora.pipeline.run import RunResult
    from mlx_sora.request.generation import GenerationRequest


class PlannedRun(Protocol):
    """A run that has a plan and can tell its seconds."""

    @property
    def plan(self) -> Plan:
        """Memory, reading and work of each stage."""

    @property
    def result(self) -> RunResult:
        """Record of what was found so far, such as warnings."""

    @property
    def written(self) -> str:
        """Length, size and rate of the frames in the file."""

    def estimate(self, speeds: MachineSpeeds) -> Estimate:
        """Estimate the seconds on the machine that has these speeds."""


def show_plans(
    ranks: Ranks, runs: Iterable[PlannedRun], renderer: Renderer, *, as_json: bool
) -> None:
    """Print the plan of each run. An error in making one is raised on all ranks."""
    from mlx_sora.manage.machine_file import KnownSpeeds, read_speeds

    # Several ranks share the work; `--ranks N` estimates that.
    known = read_speeds() if ranks.size == 1 else KnownSpeeds()
    with ranks.collective_errors():
        for index, run in enumerate(runs):
            if index == 0 and known.notice:
                renderer.note(known.notice)
            if ranks.is_rank0:
                estimate = None if known.speeds is None else run.estimate(known.speeds)
                warnings = list(dict.fromkeys(run.result.warnings))
                if as_json:
                    record = run.plan.to_dict() | estimate_record(estimate)
                    print(json.dumps(record | {"warnings": warnings}))
                else:
                    for message in warnings:
                        renderer.handle(Warned(message))
                    lines = [
                        *plan_table(run.plan),
                        f"writes {run.written}",
                        *estimate_lines(estimate),
                    ]
                    print("\n".join(lines))


def note_unread_weights(
    pipeline: Pipeline, requests: Sequence[GenerationRequest], renderer: Renderer
) -> None:
    """Show the bytes, and seconds, that checkpoints or ranks need to recognise the weights."""
    from mlx_sora.manage.machine_file import read_speeds
    from mlx_sora.memory.profiles import format_bytes
    from mlx_sora.pipeline.engine import SHOWN_BYTES
    from mlx_sora.runtime.progress import format_duration

    unread = pipeline.unread_weights(requests)
    if unread < SHOWN_BYTES:
        return
    speeds = read_speeds().speeds
    time = "" if speeds is None else f", in about {format_duration(unread / speeds.disk)}"
    renderer.note(
        f"The run first reads {format_bytes(unread)} of weights once{time}, to recognise them."
    )


def estimate_record(estimate: Estimate | None) -> dict[str, Any]:
    """Return the seconds as JSON values; null without an estimate."""
    if estimate is None:
        return {"seconds": None, "total_seconds": None}
    seconds = {stage: round(value, 3) for stage, value in estimate.seconds.items()}
    found = {"seconds": seconds, "total_seconds": round(estimate.total, 3)}
    if estimate.second_pass is not None:
        found["second_pass_seconds"] = round(estimate.second_pass, 3)
    return found


def estimate_lines(estimate: Estimate | None) -> list[str]:
    """Return the seconds as one line; none without an estimate."""
    if estimate is None:
        return []
    from mlx_sora.runtime.progress import format_duration

    stages = ", ".join(
        f"{stage} {format_duration(value)}" for stage, value in estimate.seconds.items()
    )
    found = f"estimated on this machine: {format_duration(estimate.total)} ({stages})"
    if estimate.second_pass is not None:
        found += f", of it the second pass {format_duration(estimate.second_pass)}"
    return [found]
