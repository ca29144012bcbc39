"""Sizes from configurations alone against those of files with the published shapes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.sizes import model_sizes
from mlx_sora.memory.estimate import shape_sizes
from tests.helpers.full_size import write_published


def test_as_the_published_files_have_it(tmp_path: Path) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    assert shape_sizes(4) == model_sizes(ModelFolder.open(write_published(tmp_path)), mx.float32)
    assert mx.get_active_memory() - before < 1 << 20


def test_half_the_bytes() -> None:
    whole, half = shape_sizes(4), shape_sizes(2)
    assert whole.transformer_weights.stored == 2 * half.transformer_weights.stored
    assert whole.text_weights.total == 2 * half.text_weights.total
    assert whole.temporal == half.temporal
