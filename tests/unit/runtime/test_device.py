"""Precision by device, and the report of the machine."""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import pytest

from mlx_sora.errors import UsageError
from mlx_sora.runtime import blas, device

CPU, GPU = mx.Device(mx.cpu), mx.Device(mx.gpu)


@pytest.mark.parametrize(
    ("where", "requested", "expected"),
    [
        (CPU, "auto", mx.float32),
        (CPU, "float32", mx.float32),
        (GPU, "auto", mx.bfloat16),
        (GPU, "float32", mx.float32),
        (GPU, "bfloat16", mx.bfloat16),
    ],
)
def test_dtype_by_device(where: mx.Device, requested: str, expected: mx.Dtype) -> None:
    assert device.default_dtype(where, requested) == expected


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_bfloat16_on_a_cpu_is_refused_on_linux_only(
    monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    if platform == "darwin":
        assert device.default_dtype(CPU, "bfloat16") == mx.bfloat16
        return
    with pytest.raises(UsageError, match="--dtype float32"):
        device.default_dtype(CPU, "bfloat16")


def test_unknown_dtype_lists_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="auto, float32, bfloat16"):
        device.default_dtype(CPU, "float8")


def test_float16_is_refused_for_t5() -> None:
    with pytest.raises(UsageError, match="T5 cannot run in float16"):
        device.default_dtype(CPU, "float16")


def test_describe_is_plain_data_about_this_machine() -> None:
    report = json.loads(json.dumps(device.describe()))
    assert report["backend"] in ("metal", "cuda", "cpu")
    assert report["memory"] > 1 << 28
    assert report["dtype"] == str(device.default_dtype()).removeprefix("mlx.core.")
    assert {"python", "mlx", "numpy"} <= report["versions"].keys()
    assert report["blas"] == blas.install().name


@pytest.mark.parametrize(("where", "shown"), [("cpu", "slow"), ("metal", ""), ("cuda", "")])
def test_the_blas_notice_is_for_cpus(
    monkeypatch: pytest.MonkeyPatch, where: str, shown: str
) -> None:
    slow = blas.Blas("MLX's own", fast=False, notice="slow")
    monkeypatch.setattr(blas, "install", lambda: slow)
    monkeypatch.setattr(device, "backend", lambda: where)
    assert device.blas_notice() == shown


def test_a_container_limit_below_the_ram_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = device.total_memory()
    monkeypatch.setattr(device.Path, "read_text", lambda self: f"{machine // 2}\n")
    assert device.total_memory() == machine // 2
    monkeypatch.setattr(device.Path, "read_text", lambda self: "max\n")
    assert device.total_memory() >= machine
