"""Guidance cache and interval: steps without an uncond prediction, and what replaces it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_sora.accel import Accelerations
from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.accel.guidance_cache import UncondCache, split_bands
from mlx_sora.accel.guidance_interval import IntervalGuidance
from mlx_sora.errors import UsageError
from mlx_sora.request.techniques import GuidanceCache, GuidanceInterval
from mlx_sora.sampling.base import Step
from mlx_sora.sampling.guidance import Guidance
from tests.helpers.flows import latents
from tests.helpers.techniques import make_accelerations
from tests.helpers.tolerance import rounding
from tests.unit.sampling.test_guidance import NULL, Recorder, null_text

SCHEDULE = ScheduleInfo(12, 1, 3, times=tuple(1000.0 - 80 * i for i in range(12)))
TEXT = [latents(3, (5, 6))]
Z = latents(0, (1, 3, 4, 6, 2))


def cache(text: str, schedule: ScheduleInfo = SCHEDULE) -> UncondCache:
    return UncondCache(GuidanceCache.parse(text), schedule)


def step(index: int, fresh: mx.array | None = None) -> Step:
    t = mx.array([1000.0 - 80 * index])
    return Step(index, 12, t, t - 80.0, None, fresh)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("every:3", [0, 1, 2, 3, 6, 9]),
        ("every:5", [0, 1, 2, 3, 8]),
        ("every:2,after=0.75", [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]),
        ("every:4,after=0", [0, 4, 8]),
        ("every:1", [*range(12)]),
    ],
)
def test_schedule_computes_every_nth_step(text: str, full: list[int]) -> None:
    assert sorted(cache(text).cond_only_steps) == [i for i in range(12) if i not in full]


def test_schedule_counts_only_steps_with_blocks_and_guidance() -> None:
    part = cache("every:3,after=0", replace(SCHEDULE, skipped_steps=frozenset({3, 4, 9})))
    assert sorted(set(range(12)) - part.cond_only_steps) == [0, 5, 8, 11]
    part = cache("every:3,after=0", replace(SCHEDULE, cond_only_steps=frozenset({0, 1, 6})))
    assert sorted(set(range(12)) - part.cond_only_steps - {0, 1, 6}) == [2, 5, 8, 11]


def run(part: Accelerations, seen: Recorder, sequential: bool = False) -> list[mx.array]:
    """Return the guided velocities of all steps at the same z, so that only guidance changes."""
    velocity = Guidance(seen, TEXT, null_text, 4.0, sequential=sequential, policy=part.guidance)
    return [velocity(Z, step(i).t, step(i)) for i in range(12)]


@pytest.mark.parametrize("sequential", [False, True])
def test_cached_difference_replaces_uncond(sequential: bool) -> None:
    """With a network whose predictions differ by the same in every step, the cache is exact."""
    plain, seen = Recorder(), Recorder()
    exact = run(make_accelerations({}, SCHEDULE), plain, sequential)
    part = make_accelerations({"guidance_cache": "every:4,after=0"}, SCHEDULE)
    found = run(part, seen, sequential)
    assert all(mx.allclose(a, b, atol=rounding(1e-5)) for a, b in zip(exact, found, strict=True))
    both = [1, 1] if sequential else [2]
    assert seen.batches == [*both, 1, 1, 1] * 3
    assert part.record() == {"guidance_cache": {"guided": 12, "halves_saved": 9}}
    assert "in 3 of 12 evaluations" in part.summaries()[0]


def test_bands_split_low_and_high_frequencies() -> None:
    x = latents(7, (1, 2, 10, 15, 3))
    low, high = split_bands(x)
    assert mx.allclose(low + high, x, atol=rounding(1e-6))
    flat = mx.ones((1, 1, 10, 10, 1))
    assert mx.allclose(split_bands(flat)[0], flat, atol=rounding(1e-6))
    rows = mx.arange(10)[None, None, :, None, None]
    for waves, is_low in ((1, True), (2, True), (3, False), (5, False)):
        wave = mx.broadcast_to(mx.cos(2 * mx.pi * waves * rows / 10), flat.shape)
        part = split_bands(wave)[0 if is_low else 1]
        assert mx.allclose(part, wave, atol=rounding(1e-5)), waves


def test_boost_applies_to_low_frequencies_first_and_high_ones_last() -> None:
    part = cache("every:12,after=0,boost=3")
    cond, uncond = latents(1, Z.shape), latents(2, Z.shape)
    low, high = split_bands(uncond - cond)
    assert part.predict_uncond(step(0)) is None
    part.update(step(0), (cond, uncond))
    for index, expected in ((1, 3 * low + high), (8, 3 * low + 3 * high), (11, low + 3 * high)):
        make = part.predict_uncond(step(index))
        assert make is not None
        assert mx.allclose(make(cond), cond + expected, atol=rounding(1e-5))


def test_cache_is_not_used_with_fresh_frames() -> None:
    part = cache("every:12,after=0")
    assert part.predict_uncond(step(1)) is None  # nothing is known yet
    part.update(step(1), (Z, Z))
    assert part.predict_uncond(step(2)) is not None
    assert part.predict_uncond(step(3, mx.array([[True, False, False]]))) is None


def test_interval_turns_guidance_off_outside() -> None:
    part = make_accelerations({"guidance_interval": "500,840"}, SCHEDULE)
    assert sorted(set(range(12)) - part.cond_only_steps) == [2, 3, 4, 5, 6]
    found, plain = run(part, Recorder()), run(make_accelerations({}, SCHEDULE), Recorder())
    alone = Guidance(Recorder(), TEXT, null_text, 1.0)
    for i in range(12):
        expected = plain[i] if 2 <= i <= 6 else alone(Z, step(i).t, step(i))
        assert mx.array_equal(found[i], expected)


def test_interval_refuses_empty_spans_and_warns_of_unused_ones() -> None:
    with pytest.raises(UsageError, match="lower time first"):
        GuidanceInterval.parse("900,200")
    part = IntervalGuidance(GuidanceInterval(low=3, high=4), SCHEDULE)
    assert "no step" in part.warnings[0]


def test_cache_composes_with_interval() -> None:
    modes = {"guidance_interval": "500,840", "guidance_cache": "every:3,after=0"}
    part, seen = make_accelerations(modes, SCHEDULE), Recorder()
    run(part, seen)
    assert seen.batches == [1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1]


def test_cache_works_with_any_null_text() -> None:
    make: Callable[[int], mx.array] = lambda n: NULL[:n]  # noqa: E731
    policy = make_accelerations({"guidance_cache": "every:3,after=0"}, SCHEDULE).guidance
    seen = Recorder()
    velocity = Guidance(seen, TEXT, make, 4.0, policy=policy)
    for i in range(4):
        velocity(Z, step(i).t, step(i))
    assert [(p.start, p.total) for p in seen.slices] == [(0, 2), (0, 1), (0, 1), (0, 2)]
