"""Scanning tensors for impossible values, and building one block of a network."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.safetensors import read_header
from mlx_sora.manage import smoke_test
from mlx_sora.manage.smoke_test import ValueCounts, count_bad_values, keep_first_block


def tensors(folder: Path, **arrays: mx.array) -> dict[str, ValueCounts]:
    path = folder / "model.safetensors"
    mx.save_safetensors(str(path), arrays)
    return {key: count_bad_values(info) for key, info in read_header(path).items()}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("block", [8, 1 << 23])
def test_every_bad_value_is_counted(
    tmp_path: Path, dtype: mx.Dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke_test, "_READ_SIZE", block)
    nan, inf = float("nan"), float("inf")
    largest = mx.finfo(dtype).max
    found = tensors(
        tmp_path,
        good=mx.array([0.0, -0.0, 1e-30, -3.0, largest, -largest]).astype(dtype),
        bad=mx.array([1.0, nan, -nan, inf, 2.0, -inf, inf, 0.0]).astype(dtype),
        last=mx.array([0.0] * 9 + [nan]).astype(dtype),
        zero=mx.array([[0.0, -0.0, 0.0]]).astype(dtype),
        none=mx.zeros((0, 3)).astype(dtype),
    )
    assert found == {
        "good": ValueCounts(),
        "bad": ValueCounts(nan=2, inf=3),
        "last": ValueCounts(nan=1),
        "zero": ValueCounts(all_zero=True),
        "none": ValueCounts(),
    }


def test_other_types_are_let_pass(tmp_path: Path) -> None:
    assert tensors(tmp_path, packed=mx.full((3,), 0xFFFFFFFF, mx.uint32)) == {
        "packed": ValueCounts()
    }


def test_a_large_tensor_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"large": mx.ones((24, 1 << 20))})
    info = read_header(path)["large"]
    tracemalloc.start()
    try:
        assert count_bad_values(info) == ValueCounts()
        assert tracemalloc.get_traced_memory()[1] < info.nbytes // 3
    finally:
        tracemalloc.stop()


def test_one_block_is_kept(tmp_path: Path) -> None:
    names = [
        "encoder.block.0.layer.0.x",
        "encoder.block.1.layer.0.x",
        "encoder.block.10.layer.0.x",
        "spatial_blocks.0.x",
        "spatial_blocks.27.x",
        "temporal_blocks.0.x",
        "temporal_blocks.2.x",
        "spatial_vae.module.decoder.up_blocks.1.x",
        "t_block.1.weight",
    ]
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {name: mx.zeros(1) for name in names})
    kept = keep_first_block(Checkpoint.open(tmp_path)).tensors
    assert sorted(kept) == sorted(names[i] for i in (0, 3, 5, 7, 8))
