"""Blocks that stay in memory, and the monitor of a run's budget, with scripted memory samples."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.memory.limits import process_memory
from mlx_sora.memory.residency import (
    BudgetMonitor,
    MemorySample,
    Residency,
    ResidencyPlan,
    choose_resident,
    evenly_spaced,
    sample_memory,
)
from mlx_sora.models.vae import MicroBatch
from mlx_sora.runtime.events import Finished, StepFinished, Warned

PROMPT = "a red circle moving right on a black background"
MB = 1 << 20
BLOCKS = [100] * 10


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (-50, ResidencyPlan(0, False)),
        (100, ResidencyPlan(0, False)),
        (199, ResidencyPlan(0, False)),
        (200, ResidencyPlan(0, True)),
        (299, ResidencyPlan(0, True)),
        (300, ResidencyPlan(1, True)),
        (999, ResidencyPlan(7, True)),
        (1000, ResidencyPlan(10, True)),
        (10**9, ResidencyPlan(10, True)),
    ],
)
def test_choose_resident(available: int, expected: ResidencyPlan) -> None:
    assert choose_resident(available, BLOCKS, 100) == expected


def test_choose_resident_counts_the_peak_of_loading() -> None:
    assert choose_resident(229, BLOCKS, 130) == ResidencyPlan(0, False)
    assert choose_resident(230, BLOCKS, 130) == ResidencyPlan(0, True)
    assert choose_resident(1029, BLOCKS, 130) == ResidencyPlan(7, True)
    assert choose_resident(1030, BLOCKS, 130) == ResidencyPlan(10, True)


def test_choose_resident_fits() -> None:
    for room in range(0, 1300, 7):
        chosen = choose_resident(room, BLOCKS, 100)
        streamed = 0 if chosen.resident == 10 else 2 if chosen.prefetch else 1
        assert (chosen.resident + streamed) * 100 <= max(room, 100)


@pytest.mark.parametrize("blocks", range(1, 30))
def test_evenly_spaced_gaps_differ_by_one_at_most(blocks: int) -> None:
    for count in range(blocks + 3):
        resident = sorted(evenly_spaced(blocks, count))
        assert len(resident) == min(count, blocks)
        following = [*resident[1:], blocks + resident[0]] if resident else []
        gaps = {b - a for a, b in zip(resident, following, strict=True)}
        assert max(gaps, default=0) - min(gaps, default=0) <= 1


def residency_of(samples: list[MemorySample], **options: int) -> Residency:
    left = list(samples)
    return Residency(sample=lambda: left.pop(0), **options)


def decide(residency: Residency) -> ResidencyPlan:
    residency.start_measuring()
    assert residency.record_block(0, BLOCKS, 100) is None
    plan = residency.record_block(1, BLOCKS, 100)
    assert plan is not None
    return plan


def test_record_block_counts_all_measured_memory() -> None:
    """Activations 1000 (peak without a block), 8 further blocks leave 20 each, 50 are not MLX's."""
    samples = [MemorySample(0, 5000, 0), MemorySample(400, 1090, 0), MemorySample(420, 1100, 50)]
    fixed = 1000 + 8 * 20 + 50
    for spare, expected in [(0, 0), (300, 3), (799, 7), (800, 10)]:
        total = fixed + 200 + spare
        assert decide(residency_of(samples, budget=total)).resident == expected
        assert decide(
            residency_of(samples, budget=total + 77, cache_limit=50, reserve=27)
        ) == ResidencyPlan(expected, True)


def test_record_block_ignores_shrinking_memory() -> None:
    samples = [MemorySample(0, 0, 0), MemorySample(400, 1100, 0), MemorySample(300, 1100, 0)]
    assert decide(residency_of(samples, budget=1000 + 200 + 100)) == ResidencyPlan(1, True)


def test_record_block_decides_at_once_for_a_single_block() -> None:
    residency = residency_of([MemorySample(0, 0, 0), MemorySample(400, 1100, 0)], budget=1100)
    residency.start_measuring()
    assert residency.record_block(0, [100], 100) == ResidencyPlan(1, True)


def test_residency_remembers_the_largest_peak() -> None:
    residency = residency_of(
        [MemorySample(0, 5000, 0), MemorySample(1, 10, 0), MemorySample(1, 11, 0)], budget=1
    )
    decide(residency)
    assert residency.peak == 5000


def test_residency_throttles_only_while_measuring() -> None:
    samples = [MemorySample(0, 0, 0), MemorySample(1, 10, 0), MemorySample(1, 11, 0)] * 2
    residency = residency_of(samples, budget=1, throttled=True)
    limit = mx.get_memory_limit()
    for end in (lambda: residency.record_block(0, [100], 100), residency.stop_measuring):
        residency.start_measuring()
        assert mx.get_memory_limit() == 0
        end()
        residency.stop_measuring()
        assert mx.get_memory_limit() == limit
    residency_of(samples, budget=1).start_measuring()
    assert mx.get_memory_limit() == limit


def test_sample_memory_of_this_process() -> None:
    array = mx.ones(1000)
    mx.eval(array)  # the peak may have been reset since the last allocation
    sample = sample_memory()
    assert sample.peak >= sample.active >= 0
    assert 1 << 20 < sample.non_mlx < 1 << 34


# The budget monitor.


def monitor_of(*samples: MemorySample, budget: int | None = 100 * MB) -> BudgetMonitor:
    left = list(samples)
    return BudgetMonitor("denoise", budget, sample=lambda: left.pop(0))


def test_monitor_does_nothing_within_the_budget() -> None:
    mx.clear_cache()
    monitor = monitor_of(MemorySample(10 * MB, 40 * MB, 60 * MB))
    assert monitor.check(lambda: pytest.fail("not needed")) is None
    assert monitor_of(budget=None).check(lambda: pytest.fail("no budget")) is None


def test_monitor_shrinks_each_time_and_warns_once() -> None:
    calls: list[int] = []

    def shrink() -> bool:
        calls.append(1)
        return True

    over = MemorySample(10 * MB, 50 * MB, 60 * MB)
    monitor = monitor_of(over, over)
    warning = monitor.check(shrink)
    assert warning is not None
    assert "Stage denoise reached 116 MB, over the budget of 105 MB" in warning
    assert monitor.check(shrink) is None
    assert len(calls) == 2


def test_monitor_says_if_nothing_can_shrink() -> None:
    warning = monitor_of(MemorySample(0, 0, 101 * MB)).check(lambda: False)
    assert warning is not None
    assert "nothing is left" in warning


def test_micro_batch_is_halved_down_to_one_frame() -> None:
    batch = MicroBatch(5)
    assert [batch.halve() for _ in range(3)] == [True, True, False]
    assert batch.frames == 1


@pytest.mark.skipif(process_memory() is None, reason="the system does not tell what others take")
def test_run_over_its_budget_shrinks_and_makes_the_same_video(pipe: Pipeline) -> None:
    """Resident blocks are freed and the VAE decodes fewer frames at a time."""
    values = {"prompt": PROMPT, "steps": 4, "seed": 1, "num_frames": 34}
    plain = pipe(**values, ci_dl=True)
    room = (process_memory() or 0) + 400 * MB
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
    assert warned[0].startswith("Stage denoise reached")
    assert warned[0].endswith("continuing with smaller pieces.")
    assert warned[1].startswith("Stage decode reached")
    assert list(video.warnings) == warned
    record = video.metadata["accelerations"]["ci_dl"]["denoise"]
    assert record["resident"] == 0
    assert record["loads"] > 2 * record["blocks"]
    assert video.frames is not None
    assert plain.frames is not None
    assert np.abs(video.frames.astype(int) - plain.frames.astype(int)).max() <= 1
