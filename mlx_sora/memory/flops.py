"""Floating-point operations of each network, from its matrix products.

A multiplication and an addition are two operations. Norms and activations (below 1 %) do not count.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mlx_sora.models.stdit3 import FREQUENCIES, STDiT3Config
from mlx_sora.models.t5 import T5Config
from mlx_sora.models.vae_spatial import SpatialVAEConfig
from mlx_sora.models.vae_temporal import TemporalVAEConfig


@dataclass(frozen=True)
class Grid:
    """Tokens of one transformer pass: spatial ones per latent frame, text ones per sample."""

    batch: int
    frames: int
    spatial_tokens: int
    text_tokens: int

    @classmethod
    def from_latent(
        cls, config: STDiT3Config, latent: Sequence[int], batch: int, text: int
    ) -> Grid:
        """Return the grid of latents of shape (T, H, W) after patching."""
        frames, rows, columns = (-(-n // p) for n, p in zip(latent, config.patch_size, strict=True))
        return cls(batch, frames, rows * columns, text)

    @property
    def num_tokens(self) -> int:
        return self.batch * self.frames * self.spatial_tokens


def text_encoder_flops(config: T5Config, tokens: int) -> int:
    """Count the operations of T5 on one prompt."""
    inner = config.num_heads * config.d_kv
    linear = 4 * config.d_model * inner + 3 * config.d_model * config.d_ff
    return 2 * config.num_layers * tokens * (linear + 2 * tokens * inner)


def transformer_flops(
    config: STDiT3Config,
    grid: Grid,
    merged: Sequence[Collection[str]] = (),
) -> int:
    """Count one pass of STDiT3 with prepared text; merged: sites of token merging by block."""
    channels, n = config.hidden_size, grid.num_tokens
    merged = merged[: config.depth]
    blocks = sum(_block_pair(config, grid, sites) for sites in merged)
    blocks += (config.depth - len(merged)) * _block_pair(config, grid)
    patch = math.prod(config.patch_size) * (config.in_channels + config.out_channels)
    times = grid.batch * channels * (FREQUENCIES + 7 * channels)
    return 2 * (blocks + n * patch * channels + times)


def _block_pair(config: STDiT3Config, grid: Grid, merged: Collection[str] = ()) -> int:
    """Count the multiplications of a spatial and a temporal block."""
    channels, pairs = config.hidden_size, -(-grid.frames // 2)

    def frames(*sites: str) -> int:
        return grid.frames if set(sites).isdisjoint(merged) else pairs

    place = grid.batch * grid.spatial_tokens
    total = 0
    for site in ("spatial", "temporal"):
        queries, keys = frames(site), frames(site, f"{site}-kv")
        scores = grid.spatial_tokens if site == "spatial" else keys
        total += place * (2 * queries + 2 * keys) * channels**2
        total += place * queries * 2 * scores * channels
    cross = 2 * channels**2 + 2 * grid.text_tokens * channels
    mlp = 2 * channels * int(channels * config.mlp_ratio)
    return total + 2 * place * (frames("cross") * cross + frames("mlp") * mlp)


def preparation_flops(config: STDiT3Config, grid: Grid) -> int:
    """Count what STDiT3 computes once per run: the text MLP, and text keys and values."""
    channels, tokens = config.hidden_size, grid.batch * grid.text_tokens
    mlp = channels * (config.caption_channels + channels)
    return 2 * tokens * (mlp + 2 * config.depth * 2 * channels**2)


def spatial_decoder_flops(config: SpatialVAEConfig, height: int, width: int) -> int:
    """Count the image decoder's operations on one frame of `height` x `width` latents."""
    widths = config.block_out_channels[::-1]
    area, channels = height * width, widths[0]
    total = area * (config.latent_channels**2 + 9 * config.latent_channels * channels)
    total += 2 * _residual(area, channels, channels, 9)
    total += area * (4 * channels**2 + 2 * area * channels)
    for level, width_out in enumerate(widths):
        for _ in range(config.layers_per_block + 1):
            total += _residual(area, channels, width_out, 9)
            channels = width_out
        if level < len(widths) - 1:
            area *= 4
            total += 9 * area * channels**2
    return 2 * (total + 9 * area * channels * config.out_channels)


def spatial_encoder_flops(config: SpatialVAEConfig, height: int, width: int) -> int:
    """Count the image encoder's operations on one frame of `height` x `width` pixels."""
    widths = config.block_out_channels
    area, channels = height * width, widths[0]
    total = 9 * area * config.in_channels * channels
    for level, width_out in enumerate(widths):
        for _ in range(config.layers_per_block):
            total += _residual(area, channels, width_out, 9)
            channels = width_out
        if level < len(widths) - 1:
            area //= 4
            total += 9 * area * channels**2
    total += 2 * _residual(area, channels, channels, 9)
    total += area * (4 * channels**2 + 2 * area * channels)
    moments = 2 * config.latent_channels
    return 2 * (total + area * (9 * channels * moments + moments**2))


def temporal_decoder_flops(config: TemporalVAEConfig, latents: int, height: int, width: int) -> int:
    """Count the temporal decoder's operations on one chunk of `latents` latent frames."""
    widths, area = config.widths, latents * height * width
    channels = widths[-1]
    total = area * config.latent_embed_dim * (config.embed_dim + 27 * channels)
    total += config.num_res_blocks * _residual(area, channels, channels, 27)
    for level in reversed(range(len(widths))):
        for _ in range(config.num_res_blocks):
            total += _residual(area, channels, widths[level], 27)
            channels = widths[level]
        if level > 0 and config.temporal_downsample[level - 1]:
            total += 27 * area * channels * 2 * channels
            area *= 2
    return 2 * (total + 27 * area * channels * config.in_out_channels)


def temporal_encoder_flops(config: TemporalVAEConfig, frames: int, height: int, width: int) -> int:
    """Count the temporal encoder's operations on one chunk of frames of latent size."""
    latents = config.latent_frames(frames)
    area, channels = latents * config.factor * height * width, config.filters
    total = 27 * area * config.in_out_channels * channels
    for level, width_out in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            total += _residual(area, channels, width_out, 27)
            channels = width_out
        if level < len(config.temporal_downsample) and config.temporal_downsample[level]:
            area //= 2
            total += 27 * area * channels**2
    total += config.num_res_blocks * _residual(area, channels, channels, 27)
    moments = 2 * config.latent_embed_dim
    return 2 * (total + area * moments * (channels + 2 * config.embed_dim))


def _residual(area: int, inputs: int, outputs: int, taps: int) -> int:
    projection = inputs * outputs if inputs != outputs else 0
    return area * (taps * outputs * (inputs + outputs) + projection)
