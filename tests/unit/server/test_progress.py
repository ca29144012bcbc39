"""Progress of a job from the events of its worker."""

from __future__ import annotations

import pytest

from mlx_sora.server.processes import Progress
from mlx_sora.server.store import Job
from mlx_sora.server.task import PlanSummary, Task


def started(stage: str, total: int = 4) -> dict[str, object]:
    """Return the event of a stage that begins."""
    return {"event": "stage_started", "stage": stage, "total": total}


def step(index: int, seconds: float = 2.0) -> dict[str, object]:
    """Return the event of a step."""
    return {"event": "step_finished", "step": index, "total": 4, "seconds": seconds}


def planned(stage: str, total: int, work: float, **more: int) -> dict[str, object]:
    return {"stage": stage, "total": total, "work": work, **more}


def test_events_become_fields_of_a_job() -> None:
    run = Progress(Job("", Task(), plan=PlanSummary(steps=4, seconds=100)))
    clips = [
        planned(stage, total, work, clip=clip, clips=2)
        for clip in (0, 1)
        for stage, total, work in (("denoise", 4, 25.0), ("decode", 17, 20.0))
    ]
    event = {"event": "run_planned", "stages": [planned("encode", 1, 10.0), *clips]}
    assert run.handle(event) == {}
    encode = run.handle(started("encode", 1))
    # Before the first step, what the plan says.
    assert (encode["progress"], encode["seconds_left"], encode["stage"]) == (0, 100, "encode")
    assert run.handle(started("denoise"))["progress"] == 0.1
    half = run.handle(step(1))
    assert (half["progress"], half["step"], half["steps"]) == (0.225, 2, 8)
    assert half["seconds_left"] < 100
    decode = run.handle(started("decode", 17))
    assert decode["progress"] == 0.35
    assert "step" not in decode
    done = {"event": "stage_progress", "stage": "decode", "done": 17, "total": 17}
    assert run.handle(done)["progress"] == 0.55
    ended = {"event": "stage_finished", "stage": "decode", "peak_rss": 5000}
    assert run.handle(ended)["peak_memory"] == 5000
    assert run.handle({"event": "note", "message": "hello"}) == {}
    assert run.handle(started("denoise"))["step"] == 4


def test_a_job_without_a_plan_counts_its_steps() -> None:
    run = Progress(Job("", Task()))
    assert run.handle(started("denoise"))["seconds_left"] is None
    assert run.handle(step(0))["progress"] == 0.25
    assert run.handle(step(3))["seconds_left"] == pytest.approx(0)
