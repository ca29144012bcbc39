"""What stays in memory: the arithmetic, with made-up readings."""

from __future__ import annotations

import pytest

from mlx_sora.memory.residency import (
    Blocks,
    MemorySample,
    Residency,
    Room,
    choose_resident,
    evenly_spaced,
    sample_memory,
)

TEN = Blocks([100] * 10, loading=100)


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (-50, Room(0, False)),
        (100, Room(0, False)),
        (199, Room(0, False)),
        (200, Room(0, True)),
        (299, Room(0, True)),
        (300, Room(1, True)),
        (999, Room(7, True)),
        (1000, Room(10, True)),
        (10**9, Room(10, True)),
    ],
)
def test_choose(room: int, expected: Room) -> None:
    assert choose_resident(room, TEN) == expected


def test_loading_may_take_more_than_the_block() -> None:
    casting = Blocks([100] * 10, loading=130)
    assert choose_resident(229, casting) == Room(0, False)
    assert choose_resident(230, casting) == Room(0, True)
    assert choose_resident(1029, casting) == Room(7, True)
    assert choose_resident(1030, casting) == Room(10, True)


def test_what_is_chosen_fits() -> None:
    for room in range(0, 1300, 7):
        chosen = choose_resident(room, TEN)
        streamed = 0 if chosen.resident == 10 else 2 if chosen.prefetch else 1
        assert (chosen.resident + streamed) * 100 <= max(room, 100)


@pytest.mark.parametrize("blocks", range(1, 30))
def test_spread_is_even(blocks: int) -> None:
    for count in range(blocks + 3):
        kept = sorted(evenly_spaced(blocks, count))
        assert len(kept) == min(count, blocks)
        following = [*kept[1:], blocks + kept[0]] if kept else []
        gaps = {b - a for a, b in zip(kept, following, strict=True)}
        assert max(gaps, default=0) - min(gaps, default=0) <= 1


def policy(readings: list[MemorySample], **options: int) -> Residency:
    left = list(readings)
    return Residency(read=lambda: left.pop(0), reset=lambda: None, **options)


def decide(residency: Residency, blocks: Blocks = TEN) -> Room:
    residency.begin()
    assert residency.measured(0, blocks) is None
    room = residency.measured(1, blocks)
    assert room is not None
    return room


def test_decision_counts_all_that_is_measured() -> None:
    """Work 1000 (peak without a block), 8 blocks to come leave 20 each, 50 lie outside MLX."""
    readings = [MemorySample(0, 5000, 0), MemorySample(400, 1090, 0), MemorySample(420, 1100, 50)]
    fixed = 1000 + 8 * 20 + 50
    for spare, expected in [(0, 0), (300, 3), (799, 7), (800, 10)]:
        total = fixed + 200 + spare
        assert decide(policy(readings, budget=total)).resident == expected
        assert decide(policy(readings, budget=total + 77, cache_limit=50, reserve=27)) == Room(
            expected, True
        )


def test_shrinking_memory_is_no_growth() -> None:
    readings = [MemorySample(0, 0, 0), MemorySample(400, 1100, 0), MemorySample(300, 1100, 0)]
    assert decide(policy(readings, budget=1000 + 200 + 100)) == Room(1, True)


def test_a_single_block_decides_at_once() -> None:
    residency = policy([MemorySample(0, 0, 0), MemorySample(400, 1100, 0)], budget=1100)
    residency.begin()
    assert residency.measured(0, Blocks([100], 100)) == Room(1, True)


def test_the_largest_peak_is_remembered() -> None:
    residency = policy(
        [MemorySample(0, 5000, 0), MemorySample(1, 10, 0), MemorySample(1, 11, 0)], budget=1
    )
    decide(residency)
    assert residency.peak == 5000


def test_mlx_is_held_back_only_while_measuring() -> None:
    limits = [777]

    def limit(count: int) -> int:
        limits.append(count)
        return limits[-2]

    left = [MemorySample(0, 0, 0), MemorySample(1, 10, 0), MemorySample(1, 11, 0)] * 2

    def make(*, throttled: bool) -> Residency:
        return Residency(
            1, throttled=throttled, read=lambda: left.pop(0), reset=lambda: None, limit=limit
        )

    residency = make(throttled=True)
    decide(residency)
    assert limits == [777, 0, 777]
    residency.begin()
    residency.end()
    residency.end()
    assert limits == [777, 0, 777, 0, 777]
    make(throttled=False).begin()
    assert limits == [777, 0, 777, 0, 777]


def test_reading_this_process() -> None:
    reading = sample_memory()
    assert reading.peak >= reading.active >= 0
    assert 1 << 20 < reading.outside < 1 << 34
