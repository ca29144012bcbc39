"""Smoke tests of model files: one block of each network.

Memory stays low for any model: only the first of the equal blocks is built.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from mlx_sora.errors import MlxSoraError
from mlx_sora.loading.checkpoint import Checkpoint, load_weights
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_vae
from mlx_sora.loading.quantization import (
    BLOCK_PATH,
    NetworkQuantization,
    TokenTable,
    insert_quantized_layers,
    table_form,
)
from mlx_sora.memory.limits import memory_scope
from mlx_sora.models import stdit3, t5


def keep_first_block(checkpoint: Checkpoint) -> Checkpoint:
    """Return `checkpoint` without the tensors of all blocks after the first."""
    tensors = {
        key: info
        for key, info in checkpoint.tensors.items()
        if (block := BLOCK_PATH.match(key)) is None or int(block[1]) == 0
    }
    return replace(checkpoint, tensors=tensors)


def run_text_encoder(model: ModelFolder) -> None:
    """Run one block of T5 on the first token ids. Raises MlxSoraError."""
    values = model.config("text_encoder")
    config = replace(t5.T5Config.from_dict(values), num_layers=1)
    checkpoint = keep_first_block(Checkpoint.open(model.text_encoder))
    with memory_scope():
        network = t5.T5Encoder(config, embedding=False)
        quantization = NetworkQuantization.from_config(values)
        insert_quantized_layers(network, quantization)
        table = TokenTable(checkpoint, table_form(quantization, config.d_model))
        load_weights(network, checkpoint, t5.KEYS, dtype=mx.float32, skip_keys=table.keys)
        embeddings = table(range(min(8, config.vocab_size))).astype(mx.float32)
        _check_output("text states", network(embeddings[None]))


def run_transformer(model: ModelFolder) -> None:
    """Run one spatial and one temporal block on noise. Raises MlxSoraError."""
    values = model.config("transformer")
    config = replace(stdit3.STDiT3Config.from_dict(values), depth=1)
    with memory_scope():
        network = stdit3.STDiT3(config)
        insert_quantized_layers(network, NetworkQuantization.from_config(values))
        checkpoint = keep_first_block(Checkpoint.open(model.transformer))
        load_weights(network, checkpoint, stdit3.KEYS, dtype=mx.float32)
        text = _noise(4, config.caption_channels)
        z = _noise(1, 2, 4, 4, config.in_channels)
        conditions = network.prepare([text], z.shape[1:4], height=32, width=32, fps=24)
        _check_output("velocity", network(z, mx.array([500.0]), conditions))


def run_vae(model: ModelFolder) -> None:
    """Decode noise to one small frame, then encode noise. Raises MlxSoraError."""
    with memory_scope():
        vae = load_vae(model, ("decoder",))
        z = _noise(1, 1, 4, 4, vae.config.temporal.embed_dim)
        _check_output("decoded frames", vae.decode(z, 1))
    del vae
    with memory_scope():
        vae = load_vae(model, ("encoder",))
        side = 4 * vae.config.spatial.factor
        _check_output("latents", vae.encode(mx.clip(_noise(1, 1, side, side, 3), -1, 1)))


def _noise(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(0))


def _check_output(name: str, out: mx.array) -> None:
    """Raise MlxSoraError if `out` [.., C] has NaN or Inf or is constant."""
    if not mx.isfinite(out).all().item():
        raise MlxSoraError(f"its {name} contain NaN or Inf.")
    rows = out.reshape(-1, out.shape[-1])
    if mx.array_equal(rows.max(axis=0), rows.min(axis=0)).item():
        raise MlxSoraError(f"its {name} are constant, whatever the input.")
