"""The estimate of a step on several machines follows from work, bytes and messages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mlx_sora.distributed.cost_model import (
    LINKS,
    Chip,
    Cluster,
    Link,
    chips,
    estimate_step,
    parse_chip,
    parse_link,
)
from mlx_sora.distributed.partition import choose_parallel
from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size, plan_geometry
from mlx_sora.memory.estimate import published_sizes
from mlx_sora.memory.plan import ModelSizes, Workload

CHIP = Chip("test", 1e13, math.inf)
FREE = Link("free", math.inf, 0.0)


@pytest.fixture(scope="module")
def model() -> ModelSizes:
    return published_sizes(2)


def workload(frames: int = 51, guided: bool = True) -> Workload:
    return Workload(plan_geometry(Size(426, 240), frames), 60, 30, guided=guided)


def test_free_exchange_divides_the_time(model: ModelSizes) -> None:
    single = estimate_step(model, workload(), Cluster(1, CHIP, FREE))[0]
    assert single.exchange_seconds == single.sent_bytes == 0
    two = estimate_step(model, workload(), Cluster(2, CHIP, FREE))
    assert [way.parallel_plan.cfg_degree for way in two] == [2, 1], (
        "15 frames do not divide evenly by two"
    )
    assert two[0].seconds == pytest.approx(single.seconds / 2)
    # 15 latent frames in 8 and 7; the tokens divide evenly.
    assert two[1].seconds == pytest.approx(single.seconds * (8 / 15 + 1 / 2) / 2, rel=0.01)


def test_exchange_takes_bytes_and_latency(model: ModelSizes) -> None:
    link = Link("slow", 1e8, 0.01)
    halves, frames = estimate_step(model, workload(), Cluster(2, CHIP, link))
    assert halves.parallel_plan.cfg_degree == 2
    assert halves.exchange_seconds == pytest.approx(halves.sent_bytes / 1e8 + 0.01)
    # Two exchanges per block pair except the last, which has one, and the gather of the output.
    assert frames.exchange_seconds == pytest.approx(
        frames.sent_bytes / 1e8 + (2 * 28 - 1 + 1) * 0.01
    )
    assert frames.exchange_share == pytest.approx(frames.exchange_seconds / frames.seconds)
    assert frames.sent_bytes > 100 * halves.sent_bytes


def test_without_guidance_only_sequence_remains(model: ModelSizes) -> None:
    ways = estimate_step(model, workload(guided=False), Cluster(4, CHIP, LINKS[0]))
    assert [way.parallel_plan.cfg_degree for way in ways] == [1]


def test_windows_side_by_side_take_their_rounds(model: ModelSizes) -> None:
    long = replace(workload(), clips=3, window_texts=1)
    single = estimate_step(model, long, Cluster(1, CHIP, FREE), evaluations=3)[0]
    for ranks, rounds in ((2, 2), (3, 1)):
        ways = estimate_step(model, long, Cluster(ranks, CHIP, FREE), evaluations=3)
        windows = next(way for way in ways if way.parallel_plan.mode == "windows")
        assert windows.seconds == pytest.approx(single.seconds * rounds / 3)
        # The velocity of a window in float32 to each other rank; 53 columns make 27 patches.
        numbers = 4 * math.prod(long.geometry.latent) * 54 // 53
        assert windows.sent_bytes == rounds * (ranks - 1) * 4 * numbers
    ways = estimate_step(model, long, Cluster(4, CHIP, FREE), evaluations=3)
    assert "windows" not in [way.parallel_plan.mode for way in ways]


@pytest.mark.parametrize(
    ("mode", "ranks", "windows", "found"),
    [
        ("auto", 2, 1, "guidance"),
        ("auto", 2, 4, "windows"),
        ("auto", 2, 3, "guidance"),
        ("auto", 3, 3, "windows"),
        ("auto", 4, 2, "both"),
        ("windows", 2, 3, "windows"),
        ("sequence", 2, 2, "sequence"),
    ],
)
def test_windows_are_split_if_all_ranks_have_equally_many(
    mode: str, ranks: int, windows: int, found: str
) -> None:
    assert choose_parallel(mode, ranks, guided=True, windows=windows).mode == found


def test_more_ranks_than_windows_are_refused() -> None:
    with pytest.raises(UsageError, match=r"a window for each of 3 ranks .*; this video has 2\."):
        choose_parallel("windows", 3, guided=True, windows=2)


def test_every_rank_reads_all_weights(model: ModelSizes) -> None:
    slow = Chip("slow memory", math.inf, 1e9)
    single, two = (
        estimate_step(model, workload(), Cluster(ranks, slow, FREE))[0].seconds for ranks in (1, 2)
    )
    weights = model.transformer_weights.total / 1e9
    assert two - weights == pytest.approx((single - weights) / 2)


def test_links_and_chips_are_parsed_by_name_or_measurement() -> None:
    assert [parse_link(link.name.upper()) for link in LINKS] == list(LINKS)
    assert parse_link("250MB/s,1.5ms") == Link("250MB/s,1.5ms", 2.5e8, 1.5e-3)
    assert parse_chip("M4-Max") == chips()["m4-max"]
    assert parse_chip("1.5TFLOPS").flops == 1.5e12


@pytest.mark.parametrize("text", ["usb", "0GB/s,1ms", "4GB/s", "-1GB/s,1ms", ""])
def test_unknown_links_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="thunderbolt5, 10gbe, wifi"):
        parse_link(text)


@pytest.mark.parametrize("text", ["m9", "0TFLOPS", "TFLOPS"])
def test_unknown_chips_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="m4-max.*bench link"):
        parse_chip(text)
