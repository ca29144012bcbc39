"""A model whose layers can be quantized: random T5 and STDiT in float32, the bundled VAE."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import ModelFolder, find_model
from tests.helpers import networks
from tests.helpers.published import spiece_model

T5 = replace(networks.T5, vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=3)
STDIT = replace(networks.STDIT, hidden_size=64, depth=3, caption_channels=64)


def write_model(root: Path, dtype: mx.Dtype = mx.float32) -> ModelFolder:
    """The model in `root`, its T5 and STDiT in two shards whose border lies within a block."""
    networks.t5_model(root, T5, dtype)
    networks.stdit_model(root, STDIT, dtype)
    shutil.copytree(find_model("shapes").vae, root / "vae")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "spiece.model").write_bytes(spiece_model())
    return ModelFolder.open(root)


def tensors(model: ModelFolder | Path, part: str) -> dict[str, mx.array]:
    """All tensors of a part, as they are stored."""
    path = model if isinstance(model, Path) else model.path
    checkpoint = Checkpoint.open(path / part)
    return checkpoint.load(checkpoint.tensors)
