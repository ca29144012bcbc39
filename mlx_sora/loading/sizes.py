"""Configurations and sizes of a model folder for the memory planner, read from headers."""

from __future__ import annotations

from math import prod
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_sora.loading.blocks import BlockSource
from mlx_sora.loading.checkpoint import match_keys
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import stream_text_encoder, stream_transformer
from mlx_sora.loading.published import PublishedModel
from mlx_sora.loading.quantization import dense_bytes
from mlx_sora.memory.plan import FLOAT32_SIZE, ModelSizes, VAESizes, WeightSizes
from mlx_sora.models.precision import Precision
from mlx_sora.models.vae import VAEConfig, VideoVAE, key_map


def model_sizes(model: ModelFolder, precision: Precision, *, encoders: bool = False) -> ModelSizes:
    """Return the sizes of `model` in the types of `precision`. Reads headers only.

    encoders: also those of the VAE's encoders.
    Raises WeightsError for a checkpoint that does not match its configuration.
    """
    text, _, text_blocks = stream_text_encoder(model, precision.text_encoder)
    transformer, transformer_blocks = stream_transformer(model, precision.transformer)
    config = VAEConfig.from_dict(model.config("vae"))
    return ModelSizes(
        text=text.config,
        transformer=transformer.config,
        vae=config,
        text_weights=_weight_sizes(text_blocks),
        transformer_weights=_weight_sizes(transformer_blocks),
        vae_decoder=_vae_sizes(model, config, "decoder"),
        vae_encoder=_vae_sizes(model, config, "encoder") if encoders else VAESizes(0, 0, 0),
    )


def _vae_sizes(model: ModelFolder, config: VAEConfig, part: str) -> VAESizes:
    vae = VideoVAE(config, (part,))
    disk = _float32_bytes(vae)
    if not isinstance(model, PublishedModel):
        checkpoint = model.checkpoint("vae")
        entries = match_keys(vae, checkpoint, key_map((part,)))
        disk = sum(checkpoint.tensors[entry.key].nbytes for entry in entries)
    return VAESizes(_float32_bytes(vae.temporal_vae), _float32_bytes(vae.spatial_vae), disk)


def _weight_sizes(source: BlockSource[Any]) -> WeightSizes:
    return WeightSizes(
        blocks=source.nbytes,
        load_peak_bytes=source.load_peak_bytes,
        rest=source.memory_bytes(source.non_block_entries),
        stored_blocks=sum(source.disk_bytes),
        stored_rest=source.stored_bytes(source.non_block_entries),
        largest_dequantized=max(dense_bytes(source.network, source.dtype).values(), default=0),
    )


def _float32_bytes(network: nn.Module) -> int:
    leaves: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
    return sum(prod(value.shape) for _, value in leaves) * FLOAT32_SIZE
