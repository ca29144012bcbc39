"""Estimated times, and sizes from configurations against those of files of published shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora.errors import MemoryBudgetError
from mlx_sora.geometry import Size, plan_geometry
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.sizes import model_sizes
from mlx_sora.memory.estimate import (
    ASSUMED_EFFICIENCY,
    DEVICES,
    Device,
    Efficiency,
    Estimate,
    estimate,
    estimate_from_speeds,
    published_sizes,
)
from mlx_sora.memory.plan import Machine, ModelSizes, Workload
from mlx_sora.memory.planner import make_plan
from mlx_sora.memory.profiles import PROFILES
from mlx_sora.memory.speeds import NETWORKS, MachineSpeeds, NetworkSpeed
from mlx_sora.models.precision import Precision
from tests.helpers.full_size import write_published

MAC = Device("a Mac", "mac-16gb", flops=4e12, bandwidth=100e9, disk=2e9)
#: So fast that only the other figures count.
FAST = 1e30


@pytest.fixture(scope="module")
def model() -> ModelSizes:
    return published_sizes(2)


def workload(frames: int = 51) -> Workload:
    return Workload(plan_geometry(Size(426, 240), frames), text_tokens=60, evaluations=30)


def test_compute_time_is_operations_over_speed(model: ModelSizes) -> None:
    device = replace(MAC, bandwidth=FAST, disk=FAST)
    found = estimate(model, workload(), device, 2, Efficiency(0.25, 1, 1))
    for stage in found.plan.stages:
        assert found.seconds[stage.stage] == pytest.approx(stage.flops / 1e12)
    assert found.total == pytest.approx(sum(found.seconds.values()))


def test_reading_overlaps_only_with_prefetch(model: ModelSizes) -> None:
    slow = replace(MAC, flops=FAST, bandwidth=FAST, disk=1e6)
    found = estimate(model, workload(), slow, 2, Efficiency(1, 1, 0.5))
    for stage in found.plan.stages:
        assert found.seconds[stage.stage] == pytest.approx(stage.read / 0.5e6)
    together = estimate(model, workload(), MAC, 2)
    decode = together.plan.stage("decode")
    computing = decode.flops / (MAC.flops * ASSUMED_EFFICIENCY.flops)
    reading = decode.read / (MAC.disk * ASSUMED_EFFICIENCY.disk)
    assert together.seconds["decode"] == pytest.approx(computing + reading)
    encode = together.plan.stage("encode")
    assert encode.prefetch
    assert together.seconds["encode"] == pytest.approx(
        encode.read / (MAC.disk * ASSUMED_EFFICIENCY.disk)
    )


def test_slow_memory_bounds_the_time(model: ModelSizes) -> None:
    narrow = replace(MAC, flops=FAST, disk=FAST, bandwidth=1e9)
    found = estimate(model, workload(), narrow, 2, Efficiency(1, 1, 1))
    weights = model.transformer_weights.total
    assert found.seconds["denoise"] > 30 * weights / 1e9
    assert found.seconds["encode"] > model.text_weights.total / 1e9
    usual = estimate(model, workload(), MAC, 2, Efficiency(1, 1, 1))
    assert usual.seconds["denoise"] == pytest.approx(
        usual.plan.stage("denoise").flops / MAC.flops, rel=0.01
    )


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_devices(model: ModelSizes, device: Device) -> None:
    assert device.budget == PROFILES[device.profile]
    assert 1e12 < device.flops < 30e12
    assert 50e9 <= device.bandwidth <= 819e9
    assert 1e9 <= device.disk < device.bandwidth
    found = estimate(model, workload(), device, 2)
    assert found.plan.peak <= device.budget
    assert 30 < found.total < 3600
    assert found.total < estimate(model, workload(17), replace(device, flops=1e9), 2).total


def test_a_step_on_an_iphone_takes_what_the_paper_measured(model: ModelSizes) -> None:
    """35.4 s for 256 x 256, 68 frames, 300 text tokens: On-device Sora, arXiv 2502.04363."""
    run = Workload(plan_geometry(Size(256, 256), 68), text_tokens=300, evaluations=50)
    (phone,) = (device for device in DEVICES if device.name == "iPhone 15 Pro")
    found = estimate(model, run, phone, 4)
    assert found.seconds["denoise"] / 50 == pytest.approx(35.4, rel=0.25)
    assumed = estimate(model, run, phone, 4, ASSUMED_EFFICIENCY)
    assert assumed.seconds["denoise"] < 0.7 * found.seconds["denoise"]


def test_a_run_that_does_not_fit_raises(model: ModelSizes) -> None:
    with pytest.raises(MemoryBudgetError):
        estimate(model, workload(408), DEVICES[0], 2)


def from_speeds(model: ModelSizes, run: Workload, texts: int = 1, **changes: float) -> Estimate:
    """Estimate on a machine with these speeds, and otherwise endless ones."""
    networks = {
        name: {"float32": NetworkSpeed(changes.get("flops", FAST), changes.get("per_byte", 0.0))}
        for name in NETWORKS
    }
    known = {name: changes.get(name, FAST) for name in ("bandwidth", "disk")}
    speeds = MachineSpeeds({}, {}, **known, latency=changes.get("latency", 0), networks=networks)
    plan = make_plan(model, run, Machine(gpu=True, cache_limit=1 << 30), int(11e9))
    return estimate_from_speeds(model, run, plan, speeds, Precision(), texts)


def test_measured_speeds_give_seconds(model: ModelSizes) -> None:
    found = from_speeds(model, workload(), flops=1e12)
    assert found.seconds == {s.stage: pytest.approx(s.flops / 1e12) for s in found.plan.stages}
    twice = from_speeds(model, workload(), texts=2, flops=1e12)
    assert twice.seconds["encode"] == pytest.approx(2 * found.seconds["encode"])
    assert twice.seconds["denoise"] == found.seconds["denoise"]


def test_weights_and_latency_count_in_every_pass(model: ModelSizes) -> None:
    found = from_speeds(model, workload(), per_byte=1e-9)
    weights = model.transformer_weights.total
    assert found.seconds["denoise"] == pytest.approx(30 * weights * 1e-9)
    assert found.seconds["encode"] == pytest.approx(model.text_weights.total * 1e-9)
    late = from_speeds(model, replace(workload(), sequential_guidance=True, clips=2), latency=0.01)
    assert late.seconds["denoise"] == pytest.approx(2 * 60 * 2 * 28 * 0.01)
    assert late.seconds["encode"] == pytest.approx(24 * 0.01)


def test_a_measured_disk_hides_behind_computing_only_with_prefetch(model: ModelSizes) -> None:
    slow = from_speeds(model, workload(), disk=1e9, flops=1e12)
    for stage in slow.plan.stages:
        parts = stage.read / 1e9, stage.flops / 1e12
        expected = max(parts) if stage.prefetch else sum(parts)
        assert slow.seconds[stage.stage] == pytest.approx(expected)
    assert slow.plan.stage("encode").prefetch
    assert not slow.plan.stage("decode").prefetch


def test_published_sizes_equal_those_of_the_files(tmp_path: Path) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    folder = ModelFolder.open(write_published(tmp_path))
    assert published_sizes(4) == model_sizes(folder, Precision())
    assert mx.get_active_memory() - before < 1 << 20


def test_itemsize_scales_all_but_the_vae() -> None:
    whole, half = published_sizes(4), published_sizes(2)
    assert whole.transformer_weights.stored == 2 * half.transformer_weights.stored
    assert whole.text_weights.total == 2 * half.text_weights.total
    assert whole.vae_decoder == half.vae_decoder
