"""Progress of a job from its events: shares of the plan, and seconds from the last steps."""

from __future__ import annotations

import pytest

from mlx_sora.server.processes import Progress
from mlx_sora.server.store import Job
from mlx_sora.server.task import PlanSummary, Task

PLAN = PlanSummary(steps=4, seconds=100, shares={"encode": 0.1, "denoise": 0.5, "decode": 0.4})


def progress(plan: PlanSummary | None = PLAN, **options: object) -> Progress:
    """Return the progress of a job at its beginning."""
    return Progress(Job("", Task(options=options), plan=plan))


def started(stage: str, total: int = 4) -> dict[str, object]:
    """Return the event of a stage that begins."""
    return {"event": "stage_started", "stage": stage, "total": total}


def step(index: int, seconds: float = 2.0) -> dict[str, object]:
    """Return the event of a step."""
    return {"event": "step_finished", "step": index, "total": 4, "seconds": seconds}


def test_stages_weigh_what_they_compute() -> None:
    run = progress()
    encode = run.handle(started("encode", 1))
    assert (encode["progress"], encode["seconds_left"], encode["stage"]) == (0, 100, "encode")
    assert run.handle(started("denoise"))["progress"] == 0.1
    half = run.handle(step(1))
    assert (half["progress"], half["step"], half["steps"]) == (0.35, 2, 4)
    # 8 seconds for all steps are half of the operations, of which 65 % are left.
    assert half["seconds_left"] == pytest.approx(16 * 0.65, abs=0.1)
    run.handle(step(3))
    decode = run.handle(started("decode", 17))
    assert decode["progress"] == 0.6
    assert "step" not in decode
    done = {"event": "stage_progress", "stage": "decode", "done": 17, "total": 17}
    assert run.handle(done)["progress"] == 1
    ended = {"event": "stage_finished", "stage": "decode", "peak_rss": 5000}
    assert run.handle(ended)["peak_memory"] == 5000
    assert run.handle({"event": "note", "message": "hello"}) == {}


def test_clips_follow_each_other() -> None:
    run, seen = progress(loop=2), []
    for _ in range(2):
        for event in (started("denoise"), step(3), started("decode", 17)):
            changes = run.handle(event)
            seen.append(changes["progress"])
        assert changes["steps"] == 8
    assert seen == [0.1, 0.35, 0.35, 0.55, 0.8, 0.8]
    assert run.handle(step(3))["progress"] <= 1


def test_a_job_without_a_plan_counts_its_steps() -> None:
    run = progress(None)
    assert run.handle(started("denoise"))["seconds_left"] is None
    assert run.handle(step(0))["progress"] == 0.25
    assert run.handle(step(3))["seconds_left"] == 0
