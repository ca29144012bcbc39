"""Blocks that are cast while they are read: the same values, within the planned memory."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora.loading import blocks
from mlx_sora.loading.networks import stream_transformer
from mlx_sora.memory.limits import release
from tests.helpers.quantizable_model import tensors, write_model


@pytest.mark.parametrize("limit", [1, 100_000, 1 << 30], ids=["one", "some", "all"])
def test_casts_while_reading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int) -> None:
    """One tensor at a time, some or all: as cast after reading."""
    monkeypatch.setattr(blocks, "CAST_BYTES", limit)
    model = write_model(tmp_path)
    stored = tensors(model, "transformer")
    _, source = stream_transformer(model, mx.bfloat16)
    stream = mx.new_thread_unsafe_stream(mx.cpu)
    for index in range(len(source)):
        release()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        weights = source.load(index, stream)
        assert mx.get_peak_memory() - before <= source.load_peak_bytes + (1 << 14)
        assert set(weights) == {entry.parameter.path for entry in source.entries[index]}
        for path, value in weights.items():
            assert value.dtype == mx.bfloat16
            assert mx.array_equal(value, stored[path].astype(mx.bfloat16))
        del weights, value


def test_the_plan_counts_what_is_cast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beside the block: its largest tensor, as many as may wait, or all of them as stored."""
    _, source = stream_transformer(write_model(tmp_path), mx.bfloat16)
    sizes = [source.tensors[entry.key].nbytes for entry in source.entries[0]]
    for limit, extra in ((1, max(sizes)), (100_000, 100_000), (1 << 30, sum(sizes))):
        monkeypatch.setattr(blocks, "CAST_BYTES", limit)
        source.__dict__.pop("load_peak_bytes", None)
        assert source.load_peak_bytes == source.nbytes[0] + extra
