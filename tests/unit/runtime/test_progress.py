"""Progress of a run from its events: share of the work, pace, seconds left, clips and requests."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.errors import UsageError
from mlx_sora.request.edit import EditRequest
from mlx_sora.runtime.events import (
    Event,
    PlannedStage,
    RequestFailed,
    RequestStarted,
    RunPlanned,
    StageFinished,
    StageProgress,
    StageStarted,
    StepFinished,
)
from mlx_sora.runtime.progress import RunProgress, progress_speed, progress_title

CLIP = [PlannedStage("denoise", 4, 50.0), PlannedStage("decode", 17, 40.0)]
PLAN = [PlannedStage("encode", 1, 10.0), *CLIP]


class Watched:
    """Progress with a clock that the test sets."""

    def __init__(self, *stages: PlannedStage) -> None:
        self.now = 0.0
        self.progress = RunProgress(lambda: self.now)
        if stages:
            self.progress.handle(RunPlanned(stages))

    def see(self, event: Event, after: float = 0.0) -> RunProgress:
        """Let `after` seconds pass, and then the event come."""
        self.now += after
        self.progress.handle(event)
        return self.progress


def started(stage: str, total: int = 4) -> StageStarted:
    return StageStarted(stage, total)


def step(index: int, total: int = 4) -> StepFinished:
    return StepFinished(index, total, 1.0, 0.0, mx.zeros(1))


def finished(stage: str) -> StageFinished:
    return StageFinished(stage, 0.0, 0, 0)


def test_stages_weigh_what_they_compute_and_have_one_pace() -> None:
    run = Watched(*PLAN)
    assert run.see(started("encode", 1)).fraction == 0
    run.see(StageProgress("encode", 1, 1), 30)
    # Waiting for the disk says nothing about the steps.
    assert run.see(finished("encode")).seconds_left is None
    assert run.see(started("denoise")).fraction == pytest.approx(0.1)
    first = run.see(step(0), 9)  # the weights are loaded, too
    assert first.seconds_left == pytest.approx(9 * 3 + 9 * 4 / 50 * 40)
    assert progress_speed(first) == "9 s/step, 56 s left"
    second = run.see(step(1), 2)
    assert second.seconds_per_unit == 2
    assert second.fraction == pytest.approx(0.1 + 0.25)
    assert second.seconds_left == pytest.approx(2 * 2 + 8 / 50 * 40)
    for index in (2, 3):
        run.see(step(index), 2)
    run.see(finished("denoise"))
    run.see(started("decode", 17))
    end = run.see(StageProgress("decode", 17, 17), 1)
    assert end.fraction == pytest.approx(1)
    assert end.seconds_left == 0
    assert progress_speed(end) == "17 frame/s"


def test_steps_of_an_earlier_run_are_done_but_not_by_this_one() -> None:
    run = Watched(PlannedStage("denoise", 4, 50.0, done=2), PlannedStage("decode", 17, 50.0))
    begun = run.see(started("denoise"))
    assert (begun.done, begun.fraction, begun.seconds_left) == (2, 0.25, None)
    assert run.see(step(2), 8).seconds_per_unit == 8
    assert run.progress.seconds_left == pytest.approx(8 + 8 * 4)


def test_a_leap_ends_its_stage_and_is_expected_of_later_clips() -> None:
    clips = [
        PlannedStage(stage.stage, stage.total, stage.work, clip=clip, clips=2)
        for clip in (0, 1)
        for stage in CLIP
    ]
    run = Watched(*clips)
    run.see(started("denoise"))
    for index in range(2):
        run.see(step(index), 3)
    leapt = run.see(finished("denoise"))
    assert leapt.done == leapt.total
    assert leapt.fraction == pytest.approx(50 / 180)
    run.see(started("decode", 17))
    run.see(StageProgress("decode", 17, 17), 4)
    assert run.see(finished("decode")).seconds_left == pytest.approx(6 + 4)
    assert progress_title(run.see(started("denoise"))) == "denoise clip 2 of 2"


def test_requests_that_fail_are_not_waited_for() -> None:
    run = Watched(*(PlannedStage("denoise", 4, 10.0, request=index) for index in range(4)))
    run.see(RequestStarted(1, 4, "the first could not be prepared", 0))
    run.see(started("denoise"))
    run.see(step(0), 1)
    assert run.progress.seconds_left == pytest.approx(3 + 4 + 4)
    run.see(RequestFailed(1, UsageError("broken")))
    assert (run.progress.fraction, run.progress.seconds_left) == (0.5, 8)


def test_without_a_plan_a_stage_counts_for_itself() -> None:
    run = Watched()
    assert run.see(started("hash", 100)).seconds_left is None
    half = run.see(StageProgress("hash", 50, 100), 5)
    assert (half.fraction, half.seconds_left) == (0.5, 5)


def watch(events: object) -> tuple[list[str], list[float], list[tuple[int, int]]]:
    """Return stages, fractions and clips of what a real run yields."""
    progress, fractions, stages, clips = RunProgress(), list[float](), list[str](), []
    for event in events:  # type: ignore[attr-defined]
        progress.handle(event)
        fractions.append(progress.fraction)
        if isinstance(event, StageStarted):
            stages.append(event.stage)
            clips.append((progress.clip, progress.clips))
            assert progress.total == event.total
    return stages, fractions, clips


OPTIONS = {"prompt": "a red circle", "seed": 1, "steps": 2, "width": 32, "height": 32}


def test_real_runs_do_what_they_plan(pipe: Pipeline, tmp_path: object) -> None:
    request = GenerationRequest.from_dict({**OPTIONS, "loop": 2, "num_frames": 34})
    stages, fractions, clips = watch(pipe.stream(request))
    assert stages == ["encode", *("denoise", "decode") * 2]
    assert clips == [(0, 1), *[(0, 2)] * 2, *[(1, 2)] * 2]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)

    image = GenerationRequest.from_dict({**OPTIONS, "num_frames": 1, "output": f"{tmp_path}/a.png"})
    broken = GenerationRequest.from_dict(
        {**OPTIONS, "num_frames": 1, "output": f"{__file__}/a.png"}
    )
    batch = GenerationRequest.from_dict({**OPTIONS, "num_frames": 17})
    stages, fractions, _ = watch(pipe.stream_all([broken, image, batch]))
    assert stages == ["encode", *("denoise", "decode") * 2]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)

    words = {"prompt": "a blue circle", "source_prompt": "a red circle", "steps": 2}
    edit = EditRequest.from_options(f"{tmp_path}/a.png", words)
    stages, fractions, _ = watch(pipe.stream_edit(edit))
    assert stages == ["encode", "read", "denoise", "decode"]
    assert fractions[-1] == pytest.approx(1)
