"""Sizes of a model that need not be here: from its configurations alone."""

from __future__ import annotations

from math import prod

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_sora.models.stdit3 import STDiT3, STDiT3Config
from mlx_sora.models.t5 import T5Config, T5Encoder
from mlx_sora.models.vae import VAEConfig, VideoVAE
from mlx_sora.runtime.plan import FLOAT, Model, Weights


def shape_sizes(
    itemsize: int,
    text: T5Config | None = None,
    transformer: STDiT3Config | None = None,
    vae: VAEConfig | None = None,
) -> Model:
    """A model whose weights take `itemsize` bytes in memory and on disk, its VAE float32's.

    Configurations left out are Open-Sora 1.2's. Builds the networks, allocates nothing.
    """
    text, transformer = text or T5Config(), transformer or STDiT3Config.xl_2()
    vae = vae or VAEConfig()
    encoder, denoiser = T5Encoder(text, table=False), STDiT3(transformer, mx.float32)
    decoder = VideoVAE(vae, ("decoder",))
    pairs = zip(denoiser.spatial_blocks, denoiser.temporal_blocks, strict=True)
    temporal, spatial = (
        FLOAT * _count(part) for part in (decoder.temporal_vae, decoder.spatial_vae)
    )
    return Model(
        text=text,
        transformer=transformer,
        vae=vae,
        text_weights=_weights(encoder, [_count(b) for b in encoder.encoder.block], itemsize),
        transformer_weights=_weights(denoiser, [_count(a) + _count(b) for a, b in pairs], itemsize),
        temporal=temporal,
        spatial=spatial,
        vae_stored=FLOAT * _count(decoder),
    )


def _weights(network: nn.Module, blocks: list[int], itemsize: int) -> Weights:
    rest = itemsize * (_count(network) - sum(blocks))
    sizes = tuple(itemsize * count for count in blocks)
    return Weights(sizes, loading=max(sizes), rest=rest, stored_blocks=sum(sizes), stored_rest=rest)


def _count(network: nn.Module) -> int:
    """Values of all parameters."""
    leaves: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
    return sum(prod(value.shape) for _, value in leaves)
