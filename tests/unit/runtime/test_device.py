"""Precision by device, the description of the machine, and errors of MLX about memory and time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_sora import MemoryBudgetError, Pipeline
from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.runtime import blas, device
from mlx_sora.runtime.device import explain_device_error

CPU, GPU = mx.Device(mx.cpu), mx.Device(mx.gpu)


@pytest.mark.parametrize(
    ("where", "requested", "expected"),
    [
        (CPU, "auto", mx.float32),
        (CPU, "float32", mx.float32),
        (GPU, "auto", mx.bfloat16),
        (GPU, "float32", mx.float32),
        (GPU, "bfloat16", mx.bfloat16),
        (GPU, "float16", mx.float16),
    ],
)
def test_dtype_by_device(where: mx.Device, requested: str, expected: mx.Dtype) -> None:
    assert device.default_dtype(where, requested) == expected


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_half_precision_on_a_cpu_is_refused_on_linux_only(
    monkeypatch: pytest.MonkeyPatch, platform: str, name: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    if platform == "darwin":
        assert device.default_dtype(CPU, name) == getattr(mx, name)
        assert device.choose_precision("auto", name, CPU).vae == getattr(mx, name)
        return
    with pytest.raises(UsageError, match=f"{name}.*slower.*--dtype float32"):
        device.default_dtype(CPU, name)
    with pytest.raises(UsageError, match=f"{name}.*slower.*--vae-dtype float32"):
        device.choose_precision("auto", name, CPU)
    assert device.choose_precision("auto", name, GPU).vae == getattr(mx, name)


def test_unknown_dtype_lists_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="auto, float32, bfloat16, float16"):
        device.default_dtype(CPU, "float8")
    with pytest.raises(UsageError, match="VAE dtype 'auto'.*float32, bfloat16, float16"):
        device.choose_precision("auto", "auto")


def test_t5_never_runs_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert device.choose_precision("float16", device=GPU).text_encoder == mx.bfloat16
    assert device.choose_precision("float16", device=CPU).text_encoder == mx.float32
    for name in ("float32", "bfloat16"):
        chosen = device.choose_precision(name, device=GPU)
        assert chosen.text_encoder == chosen.transformer == getattr(mx, name)


def test_describe_is_plain_data_about_this_machine() -> None:
    report = json.loads(json.dumps(device.describe_machine()))
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


#: Messages of MLX and from reports of its users.
OUT_OF_MEMORY = (
    "[malloc_or_wait] Unable to allocate 134217728 bytes.",
    "[malloc] Unable to allocate 9000000000 bytes.",
    "[metal::malloc] Attempting to allocate 28611722496 bytes which is greater than the maximum "
    "allowed buffer size of 9534832640 bytes.",
    "[conv] A single unfolding row needs 9534832641 bytes, which exceeds the maximum Metal buffer "
    "size of 9534832640 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "std::bad_alloc",
    "cudaMallocAsync(&ptr, size, stream) failed: out of memory",
)
TOO_LONG = (
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
    "(00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
    "[METAL] Command buffer execution failed: Caused GPU Hang Error "
    "(00000003:kIOGPUCommandBufferCallbackErrorHang)",
)
LOST_GPU = (
    "[METAL] Command buffer execution failed: Discarded (victim of GPU error/recovery) "
    "(00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)",
    "[METAL] Command buffer execution failed: Ignored (for causing prior/excessive GPU errors) "
    "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)",
)
COMPILER = (
    "[Compile::eval_cpu] Failed to compile function AbsfB: Failed to execute command with return "
    'code 1: "g++ -std=c++17", the output is: No space left on device',
    "Could not load C++ shared library /tmp/mlx/0.32.4/cpu/libAbsfB.so: file too short",
)
OTHERS = ("[matmul] Last dimension of first input", "[read] Unable to read from file.", "")


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_out_of_memory_is_a_memory_error(text: str) -> None:
    found = explain_device_error(RuntimeError(text), "denoise")
    assert isinstance(found, MemoryBudgetError)
    assert found.exit_code == 3
    assert "Stage denoise" in str(found)
    assert "--" in found.fix


@pytest.mark.parametrize("text", COMPILER)
def test_a_compiler_that_fails_is_explained(text: str) -> None:
    found = explain_device_error(RuntimeError(text), "decode")
    assert type(found) is MlxSoraError
    assert "TMPDIR" in found.fix


@pytest.mark.parametrize("text", TOO_LONG)
def test_gpu_timeouts_are_explained(text: str) -> None:
    found = explain_device_error(RuntimeError(text), "decode")
    assert type(found) is MlxSoraError
    assert "Stage decode" in str(found)
    for way in ("display off", "ssh", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1", "--vae-tiles"):
        assert way in found.fix


@pytest.mark.parametrize("text", LOST_GPU)
def test_a_gpu_that_others_broke_is_explained(text: str) -> None:
    found = explain_device_error(RuntimeError(text), "decode")
    assert type(found) is MlxSoraError
    assert "Start again" in found.fix
    assert ("--vae-tiles" in found.fix) is ("Ignored" in text)


@pytest.mark.parametrize("text", OTHERS)
def test_other_errors_are_not_explained(text: str) -> None:
    assert explain_device_error(RuntimeError(text), "encode") is None
    assert explain_device_error(ValueError(OUT_OF_MEMORY[0]), "encode") is None
    assert explain_device_error(KeyboardInterrupt(), "encode") is None


def test_memory_error_of_python_is_explained() -> None:
    assert isinstance(explain_device_error(MemoryError(), "read"), MemoryBudgetError)


@pytest.mark.parametrize(
    ("place", "stage"),
    [
        ("mlx_sora.pipeline.stages.encode_tokens", "encode"),
        ("mlx_sora.sampling.loop.denoise", "denoise"),
        ("mlx_sora.pipeline.stages.to_uint8", "decode"),
        ("mlx_sora.loading.blocks.load_tensors", "encode"),
    ],
)
def test_every_stage_explains_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, stage: str
) -> None:
    tried = []

    def fail(*arguments: Any, **more: Any) -> None:
        tried.append(arguments)
        raise RuntimeError(OUT_OF_MEMORY[0])

    monkeypatch.setattr(place, fail)
    if place.endswith("load_tensors"):
        monkeypatch.setattr("mlx_sora.loading.checkpoint.load_tensors", fail)
        monkeypatch.setattr("mlx_sora.loading.blocks.BlockSource._load_from_file", fail)
    request = {"steps": 1, "num_frames": 1, "output": tmp_path / "a.png"}
    with pytest.raises(MemoryBudgetError, match=f"Stage {stage}: out of memory"):
        Pipeline.from_pretrained("shapes")("a red circle", ci_dl="load" in place, **request)
    assert len(tried) == 1, "not retried"
    assert list(tmp_path.iterdir()) == []
