"""Operations from shapes against operations counted while the networks run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from mlx_sora.memory.flops import (
    Grid,
    preparation_flops,
    spatial_decoder_flops,
    spatial_encoder_flops,
    temporal_decoder_flops,
    temporal_encoder_flops,
    text_encoder_flops,
    transformer_flops,
)
from mlx_sora.models import conv
from mlx_sora.models.stdit3 import STDiT3, STDiT3Config
from mlx_sora.models.t5 import T5Config, T5Encoder
from mlx_sora.models.vae_spatial import SpatialVAE, SpatialVAEConfig
from mlx_sora.models.vae_temporal import TemporalVAE, TemporalVAEConfig
from mlx_sora.request.techniques import PAPER_SITES

STDIT = STDiT3Config(hidden_size=48, depth=3, num_heads=4, caption_channels=20, model_max_length=4)


def matrices(network: nn.Module, without: str = "") -> int:
    """Count the elements of all weight matrices whose names do not contain `without`."""
    leaves: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
    return sum(
        value.size
        for path, value in leaves
        if path.endswith("weight") and value.ndim == 2 and not (without and without in path)
    )


def test_text_encoder() -> None:
    """One token: every matrix once, and one score and one value per head channel."""
    config = T5Config(d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=2)
    linear = matrices(T5Encoder(config, embedding=False), "relative_attention_bias")
    assert text_encoder_flops(config, 1) == 2 * (linear + 3 * 2 * 16)
    assert text_encoder_flops(config, 7) == 2 * (7 * linear + 3 * 7 * 7 * 2 * 16)


def test_transformer() -> None:
    """One token of video and text: every matrix once; scores and values of three attentions."""
    network = STDiT3(STDIT)
    once = matrices(network.y_embedder) + sum(
        matrices(block.cross_attn.kv_linear)
        for block in (*network.spatial_blocks, *network.temporal_blocks)
    )
    grid = Grid.from_latent(STDIT, (1, 2, 2), batch=1, text=1)
    assert grid == Grid(1, 1, 1, 1)
    assert preparation_flops(STDIT, grid) == 2 * once
    rest = matrices(network) - once - matrices(network.fps_embedder) - 48 * 48
    attention = 2 * 3 * 48 * (1 + 1) * 2  # blocks of both kinds, self and cross, scores and values
    assert transformer_flops(STDIT, grid) == 2 * (rest + attention) + 2 * 48 * 48


def test_transformer_operations_scale_with_the_grid() -> None:
    grid = Grid(batch=1, frames=8, spatial_tokens=30, text_tokens=9)
    one = transformer_flops(STDIT, grid)
    assert transformer_flops(STDIT, replace(grid, batch=2)) == 2 * one
    assert transformer_flops(STDIT, replace(grid, spatial_tokens=60)) > 2 * one
    # Merging halves all of the blocks but their MLPs, and quarters the scores along time.
    saved = one - transformer_flops(STDIT, grid, [PAPER_SITES] * 3)
    linear, scores = 6 * 48**2 + 2 * 9 * 48, 2 * 48
    halved = 2 * 3 * 240 * (2 * linear + scores * 30)
    assert saved == halved // 2 + 2 * 3 * 240 * scores * 8 * 3 // 4
    cross = 2 * (2 * 48**2 + 2 * 9 * 48)  # multiplications and additions of a token
    first = transformer_flops(STDIT, grid, [["cross"]])
    assert one - first == 2 * 240 * cross // 2
    keys = transformer_flops(STDIT, grid, [["temporal-kv"]] * 99)
    assert one - keys == 2 * 3 * 240 * (48**2 + scores * 8 // 2)
    still = replace(grid, frames=1)
    assert transformer_flops(STDIT, still, [PAPER_SITES] * 3) == transformer_flops(STDIT, still)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the multiplications of every convolution that runs."""
    done: list[int] = []

    def watch(name: str) -> None:
        plain: Callable[..., mx.array] = getattr(conv, name)

        def run(x: mx.array, weight: mx.array, *more: Any) -> mx.array:
            out = plain(x, weight, *more)
            done.append(out.size // out.shape[-1] * weight.size)
            return out

        monkeypatch.setattr(conv, name, run)

    for name in ("conv2d", "downsample2d", "upsample_conv2d", "causal_conv3d"):
        watch(name)
    pointwise = conv.Pointwise.__call__

    def count_pointwise(layer: conv.Pointwise, x: mx.array) -> mx.array:
        done.append(x.size // x.shape[-1] * layer.weight.size)
        return pointwise(layer, x)

    monkeypatch.setattr(conv.Pointwise, "__call__", count_pointwise)
    return done


@pytest.mark.parametrize("widths", [(8, 16, 16), (8, 8), (8, 16, 8, 24)])
def test_spatial_decoder(counted: list[int], widths: tuple[int, ...]) -> None:
    config = SpatialVAEConfig(block_out_channels=widths, layers_per_block=1, norm_num_groups=4)
    SpatialVAE(config, ("decoder",)).decode(mx.zeros((1, 4, 6, 4)))
    attention = 2 * 24 * 24 * widths[-1]
    assert spatial_decoder_flops(config, 4, 6) == 2 * (sum(counted) + attention)


@pytest.mark.parametrize("widths", [(8, 16, 16), (8, 8), (8, 16, 8, 24)])
def test_spatial_encoder(counted: list[int], widths: tuple[int, ...]) -> None:
    config = SpatialVAEConfig(block_out_channels=widths, layers_per_block=1, norm_num_groups=4)
    height, width = 4 * config.factor, 6 * config.factor
    SpatialVAE(config, ("encoder",)).encode(mx.zeros((1, height, width, 3)))
    attention = 2 * 24 * 24 * widths[-1]
    assert spatial_encoder_flops(config, height, width) == 2 * (sum(counted) + attention)


@pytest.mark.parametrize("doubled", [(False, True, True), (True, False, True)])
def test_temporal_decoder(counted: list[int], doubled: tuple[bool, ...]) -> None:
    config = TemporalVAEConfig(
        filters=4,
        num_res_blocks=2,
        channel_multipliers=(1, 2, 2, 4),
        temporal_downsample=doubled,
        num_groups=4,
    )
    TemporalVAE(config, ("decoder",)).decode(mx.zeros((1, 2, 4, 5, 4)), 8)
    assert temporal_decoder_flops(config, 2, 4, 5) == 2 * sum(counted)


@pytest.mark.parametrize("halved", [(False, True, True), (True, False, True)])
def test_temporal_encoder(counted: list[int], halved: tuple[bool, ...]) -> None:
    config = TemporalVAEConfig(
        filters=4,
        num_res_blocks=2,
        channel_multipliers=(1, 2, 2, 4),
        temporal_downsample=halved,
        num_groups=4,
    )
    TemporalVAE(config, ("encoder",)).encode(mx.zeros((1, 7, 4, 5, 4)))
    assert temporal_encoder_flops(config, 7, 4, 5) == 2 * sum(counted)
