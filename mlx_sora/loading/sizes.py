"""Configurations and sizes of a model folder for the memory planner, read from headers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlx_sora.errors import WeightsError
from mlx_sora.geometry import FRAMES_PER_CELL, MICRO_FRAME_SIZE
from mlx_sora.loading.blocks import BlockSource
from mlx_sora.loading.checkpoint import match_keys
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import stream_decoder, stream_text_encoder, stream_transformer
from mlx_sora.loading.published import PublishedModel
from mlx_sora.loading.quantization import dense_bytes
from mlx_sora.memory.estimate import vae_sizes
from mlx_sora.memory.plan import ModelSizes, VAESizes, WeightSizes
from mlx_sora.models.config import FIX
from mlx_sora.models.precision import Precision
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.t5 import T5Config
from mlx_sora.models.vae import VAEConfig, VideoVAE, key_map


def model_sizes(model: ModelFolder, precision: Precision, *, encoders: bool = False) -> ModelSizes:
    """Return the sizes of `model` in the types of `precision`. Reads headers only.

    encoders: also those of the VAE's encoders.
    Raises WeightsError for a checkpoint that does not match its configuration.
    """
    text, _, text_blocks = stream_text_encoder(model, precision.text_encoder)
    transformer, transformer_blocks = stream_transformer(model, precision.transformer)
    config = VAEConfig.from_dict(model.config("vae"))
    check_parts(text.config, transformer.config, config)
    return ModelSizes(
        text=text.config,
        transformer=transformer.config,
        vae=config,
        text_weights=_weight_sizes(text_blocks, transformer.config.model_max_length),
        transformer_weights=_weight_sizes(transformer_blocks),
        vae_decoder=_vae_sizes(model, config, "decoder"),
        vae_encoder=_vae_sizes(model, config, "encoder") if encoders else VAESizes(0, 0, 0),
    )


def check_parts(text: T5Config, transformer: STDiT3Config, vae: VAEConfig) -> None:
    """Raise WeightsError unless the parts fit each other and the sizes that requests have."""
    pairs = [
        (f"{text.d_model} text encoder channels", transformer.caption_channels, "caption channels"),
        (f"{vae.temporal.embed_dim} VAE channels", transformer.in_channels, "latent channels"),
    ]
    for found, expected, name in pairs:
        if not found.startswith(f"{expected} "):
            raise WeightsError(
                f"The parts are of different models: {found}, {expected} {name}.",
                "Use the parts of one model.",
            )
    sizes = [
        ("micro_frame_size", vae.micro_frame_size, MICRO_FRAME_SIZE),
        ("frames per latent", vae.temporal.factor, FRAMES_PER_CELL),
    ]
    for name, size, expected in sizes:
        if size != expected:
            raise WeightsError(f"The VAE's {name} is {size}, not Open-Sora's {expected}.", FIX)


def _vae_sizes(model: ModelFolder, config: VAEConfig, part: str) -> VAESizes:
    vae = VideoVAE(config, (part,))
    sizes = vae_sizes(vae)
    if isinstance(model, PublishedModel):
        return sizes
    checkpoint = model.checkpoint("vae")
    entries = match_keys(vae, checkpoint, key_map((part,)))
    disk = sum(checkpoint.tensors[entry.key].nbytes for entry in entries)
    layers = sizes.layers
    if layers is not None:
        _, source = stream_decoder(model)
        peak, stored = source.load_peak_bytes, sum(source.disk_bytes)
        layers = replace(layers, load_peak_bytes=peak, stored_blocks=stored)
    return replace(sizes, stored=disk, layers=layers)


def _weight_sizes(source: BlockSource[Any], rows: int | None = None) -> WeightSizes:
    """Return the sizes of a network. rows: most inputs of a layer, if they are few."""
    dense = dense_bytes(source.network, source.dtype, rows)
    return WeightSizes(
        blocks=source.nbytes,
        load_peak_bytes=source.load_peak_bytes,
        rest=source.memory_bytes(source.non_block_entries),
        stored_blocks=sum(source.disk_bytes),
        stored_rest=source.stored_bytes(source.non_block_entries),
        largest_dequantized=max(dense.values(), default=0),
    )
