"""A run that outgrows its budget takes less at a time, says so once, and makes the same video."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.memory.limits import current_rss
from mlx_sora.memory.residency import BudgetMonitor, MemorySample
from mlx_sora.models.vae import MicroBatch
from mlx_sora.runtime.events import Finished, StepFinished, Warned

PROMPT = "a red circle moving right on a black background"
MB = 1 << 20


def guard(*readings: MemorySample, budget: int | None = 100 * MB) -> BudgetMonitor:
    left = list(readings)
    return BudgetMonitor("denoise", budget, read=lambda: left.pop(0))


def test_within_the_budget_nothing_is_done() -> None:
    mx.clear_cache()
    watched = guard(MemorySample(10 * MB, 40 * MB, 60 * MB))
    assert watched.check(lambda: pytest.fail("not needed")) is None
    assert guard(budget=None).check(lambda: pytest.fail("no budget")) is None


def test_each_time_it_is_exceeded_less_is_taken_but_it_is_told_once() -> None:
    calls: list[int] = []

    def lessen() -> bool:
        calls.append(1)
        return True

    over = MemorySample(10 * MB, 50 * MB, 60 * MB)
    watched = guard(over, over)
    warning = watched.check(lessen)
    assert warning is not None
    assert "Stage denoise has come to 116 MB, over the budget of 105 MB" in warning
    assert watched.check(lessen) is None
    assert len(calls) == 2


def test_where_nothing_is_left_it_says_so() -> None:
    warning = guard(MemorySample(0, 0, 101 * MB)).check(lambda: False)
    assert warning is not None
    assert "nothing is left" in warning


def test_a_micro_batch_is_halved_down_to_one_frame() -> None:
    batch = MicroBatch(5)
    assert [batch.halve() for _ in range(3)] == [True, True, False]
    assert batch.frames == 1


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("shapes")


@pytest.mark.skipif(current_rss() is None, reason="the system does not tell what others take")
def test_memory_that_something_else_takes_is_made_up_for(pipe: Pipeline) -> None:
    """Blocks that stayed go, the VAE takes fewer frames at a time; the video is the same."""
    values = {"prompt": PROMPT, "steps": 4, "seed": 1, "num_frames": 34}
    plain = pipe(**values, ci_dl=True)
    room = (current_rss() or 0) + 400 * MB
    ballast, warned, last = None, list[str](), None
    for event in pipe.stream(GenerationRequest.from_dict({**values, "memory_budget": str(room)})):
        if isinstance(event, StepFinished) and ballast is None:
            assert warned == []
            ballast = np.ones(500 * MB, np.uint8)
        elif isinstance(event, Warned):
            warned.append(event.message)
        last = event
    assert isinstance(last, Finished)
    video = last.video
    assert len(warned) == 2
    assert warned[0].startswith("Stage denoise has come to")
    assert warned[0].endswith("it goes on with less at a time.")
    assert warned[1].startswith("Stage decode has come to")
    assert list(video.warnings) == warned
    record = video.metadata["accelerations"]["ci_dl"]["denoise"]
    assert record["resident"] == 0
    assert record["loads"] > 2 * record["blocks"]
    assert video.frames is not None
    assert plain.frames is not None
    assert np.abs(video.frames.astype(int) - plain.frames.astype(int)).max() <= 1
