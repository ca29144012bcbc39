"""Building one block of a network."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.manage.smoke_test import keep_first_block


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
