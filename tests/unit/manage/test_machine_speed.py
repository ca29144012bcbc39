"""Measuring a machine with tiny networks and a clock that is not real."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora.errors import MlxSoraError
from mlx_sora.loading.safetensors import read_header
from mlx_sora.manage import disk_speed, machine_speed
from mlx_sora.manage.machine_check import CheckResult
from mlx_sora.manage.machine_file import machine_identity
from mlx_sora.manage.machine_speed import SECONDS, SpeedTest, largest_affordable
from mlx_sora.manage.speed_report import published_chip, speed_rows
from mlx_sora.memory.speeds import MachineSpeeds, NetworkSpeed
from mlx_sora.models.ops import on_gpu
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.t5 import T5Config
from mlx_sora.models.vae import VAEConfig
from mlx_sora.models.vae_spatial import SpatialVAEConfig
from mlx_sora.models.vae_temporal import TemporalVAEConfig
from tests.helpers.speeds import SPEEDS

#: Seconds that a work takes by the clock of these tests: so many that no size is affordable.
SLOW = 1e6

TINY = SpeedTest(
    text=T5Config(d_model=32, d_kv=8, num_heads=4, d_ff=32, num_layers=3),
    transformer=STDiT3Config(hidden_size=32, num_heads=2, caption_channels=16, depth=2),
    vae=VAEConfig(
        spatial=SpatialVAEConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4),
        temporal=TemporalVAEConfig(filters=4, num_groups=2),
    ),
)


@pytest.fixture
def speeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MachineSpeeds]:
    monkeypatch.setenv("MLX_SORA_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(machine_speed, "_SIDE", 16)
    monkeypatch.setattr(machine_speed, "_COPY", 1 << 12)
    monkeypatch.setattr(disk_speed, "FILE_BYTES", 1 << 14)
    monkeypatch.setattr(disk_speed, "TENSOR_BYTES", 1 << 12)
    ticks = count()
    yield replace(TINY, clock=lambda: next(ticks) * SLOW).run(seen.append)
    assert list(tmp_path.iterdir()) == []


seen: list[str] = []


def test_everything_is_measured(speeds: MachineSpeeds) -> None:
    types = ("float32", "bfloat16", "float16") if on_gpu() else ("float32",)
    assert speeds.machine == machine_identity()
    assert tuple(speeds.products) == tuple(speeds.networks["transformer"]) == types
    assert "float16" not in speeds.networks["text_encoder"]
    assert speeds.products["float32"] == pytest.approx(2 * 16**3 / SLOW)
    assert speeds.bandwidth == pytest.approx(2 * (1 << 12) / SLOW)
    assert speeds.latency == pytest.approx(SLOW / 16)
    assert speeds.disk > 0
    assert MachineSpeeds.from_dict(speeds.to_dict()) == speeds
    assert {"disk", "transformer, float32", "vae, float32"} <= set(seen)


def test_short_works_are_repeated_and_the_fastest_run_counts() -> None:
    moments = iter([0.0, 1.0, 10.0, 10.5, 20.0, 22.0, 30.0, 31.0, 99.0])
    assert SpeedTest(clock=lambda: next(moments)).seconds(lambda: mx.zeros(1)) == 0.5
    assert next(moments) == 99.0
    moments = iter([0.0, SECONDS, 99.0])
    assert SpeedTest(clock=lambda: next(moments)).seconds(lambda: mx.zeros(1)) == SECONDS


def test_sizes_follow_from_the_speed() -> None:
    sizes = (1000, 100, 10)
    assert largest_affordable(sizes, float, 1e9) == 1000
    assert largest_affordable(sizes, float, 100 / SECONDS) == 10
    assert largest_affordable(sizes, float, 200 / SECONDS) == 100
    assert largest_affordable(sizes, float, 0.1) == 10


def test_two_works_give_speed_and_time_of_the_weights() -> None:
    network = machine_speed._random(machine_speed.T5Block(TINY.text, has_bias=False))
    size = sum(value.nbytes for _, value in machine_speed._leaves(network))
    found = machine_speed._fit([1e9, 5e9], [3.0, 7.0], network, 2e9)
    assert found == NetworkSpeed(pytest.approx(1e9), pytest.approx(2 / size))
    assert found.seconds(1e9, size) == pytest.approx(3.0)
    for short, long in ((7.0, 7.0), (9.0, 7.0), (0.1, 7.0), (6.9, 7.0)):
        assert machine_speed._fit([1e9, 5e9], [short, long], network, 1e15) == NetworkSpeed(
            5e9 / long
        )
    assert machine_speed._fit([1e9, 5e9], [5.0, 7.0], network, 1e9).flops == 1e9


def test_the_disk_is_read_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_speed, "FILE_BYTES", 1 << 14)
    monkeypatch.setattr(disk_speed, "TENSOR_BYTES", 1 << 12)
    with disk_speed.test_file(tmp_path) as path:
        tensors = read_header(path)
        assert len(tensors) == 4
        assert path.stat().st_size > 1 << 14
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(disk_speed, "WRITE_SECONDS", 0.0)
    with disk_speed.test_file(tmp_path) as path:
        assert len(read_header(path)) == 1


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_speed, "FILE_BYTES", 0)
    with pytest.raises(MlxSoraError, match="No space left"), disk_speed.test_file(tmp_path):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_the_cache_folder_stands_in_for_models_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("MLX_SORA_WEIGHTS", str(tmp_path))
    assert disk_speed.test_folder() != tmp_path


def row(speeds: MachineSpeeds, name: str) -> CheckResult:
    return next(row for row in speed_rows(speeds) if row.name == f"speed, {name}")


def test_rows_name_what_is_slow() -> None:
    assert {row.status for row in speed_rows(SPEEDS)} == {"ok"}
    assert row(SPEEDS, "matrix product, bfloat16").message == "4 TFLOP/s"
    assert row(SPEEDS, "transformer, float32").message == "1 TFLOP/s, 50% of a matrix product"
    disk = row(replace(SPEEDS, disk=1e8), "disk")
    assert (disk.status, disk.message) == ("slow", "0.1 GB/s")
    assert "MLX_SORA_WEIGHTS" in disk.advice
    networks = {**SPEEDS.networks, "vae": {"float32": NetworkSpeed(1e11)}}
    assert row(replace(SPEEDS, networks=networks), "vae, float32").status == "slow"


def test_a_known_chip_is_compared_with_its_published_figures() -> None:
    chip = published_chip("Apple M4 Pro")
    assert chip is not None
    assert chip.name.endswith("M4 Pro")
    known = replace(SPEEDS, machine={"device": "Apple M4 Pro"}, products={"float32": 1e12})
    assert row(known, "matrix product, float32").status == "slow"
    assert row(known, "memory").status == "ok"
    assert row(replace(known, bandwidth=50e9), "memory").status == "slow"
