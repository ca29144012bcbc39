"""The temporal VAE: four frames of spatial latents to one and back, causal in time.

Mirrors VAE_Temporal of Open-Sora 1.2. Channels last: [B, T, H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from mlx_sora.models.config import MAX_DEPTH, NetworkConfig, require
from mlx_sora.models.conv import CausalConv3d, GroupNorm, Pointwise
from mlx_sora.models.hooks import BlockProvider, ResidentBlocks
from mlx_sora.models.key_map import KeyMap, KeyRule
from mlx_sora.models.vae_spatial import NETWORKS

#: Layer of the decoder, with its weights.
Layer = Callable[[mx.array], mx.array]

#: Epsilon of every group norm; statistics run over all frames of the chunk.
EPS = 1e-5


@dataclass(frozen=True)
class TemporalVAEConfig(NetworkConfig):
    """Constructor arguments of VAE_Temporal; defaults are VAE_Temporal_SD's."""

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32

    def __post_init__(self) -> None:
        require(self.num_res_blocks <= MAX_DEPTH, f"num_res_blocks is {self.num_res_blocks}")
        levels, steps = len(self.channel_multipliers), len(self.temporal_downsample)
        require(
            steps == levels - 1,
            f"temporal_downsample has {steps} entries for {levels} channel_multipliers",
        )

    @property
    def factor(self) -> int:
        """Frames per latent."""
        return int(2 ** sum(self.temporal_downsample))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, outermost first."""
        return tuple(self.filters * m for m in self.channel_multipliers)

    def latent_frames(self, num_frames: int) -> int:
        """Return the number of latents of `num_frames` frames that are encoded at once."""
        return -(-num_frames // self.factor)


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, plus the (projected) input; convolutions without bias."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inputs, groups, EPS)
        self.conv1 = CausalConv3d(inputs, outputs, bias=False)
        self.norm2 = GroupNorm(outputs, groups, EPS)
        self.conv2 = CausalConv3d(outputs, outputs, bias=False)
        if inputs != outputs:
            self.conv3 = Pointwise(inputs, outputs, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.conv1(self.norm1(x, silu=True))
        y = self.conv2(self.norm2(y, silu=True))
        return (self.conv3(x) if "conv3" in self else x) + y


def _level(inputs: int, outputs: int, config: TemporalVAEConfig) -> list[ResBlock]:
    return [
        ResBlock(inputs if i == 0 else outputs, outputs, config.num_groups)
        for i in range(config.num_res_blocks)
    ]


class TemporalEncoder(nn.Module):
    """[B, T, H, W, C], T a multiple of the factor, to [B, T / factor, H, W, 2 latent_embed_dim]."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv3d(config.in_out_channels, config.filters, bias=False)
        self.block_res_blocks = [
            _level(a, b, config) for a, b in zip((config.filters, *widths), widths, strict=False)
        ]
        self.conv_blocks = [
            CausalConv3d(width, width, bias=True, time_stride=2) if halve else nn.Identity()
            for width, halve in zip(widths, config.temporal_downsample, strict=False)
        ]
        self.res_blocks = _level(widths[-1], widths[-1], config)
        self.norm1 = GroupNorm(widths[-1], config.num_groups, EPS)
        self.conv2 = Pointwise(widths[-1], 2 * config.latent_embed_dim)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for i, level in enumerate(self.block_res_blocks):
            for block in level:
                x = block(x)
            if i < len(self.conv_blocks):
                x = self.conv_blocks[i](x)
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(self.norm1(x, silu=True))


#: Start of the paths of the decoder's layers that double the frames.
_UPSAMPLING = "conv_blocks"


class TemporalDecoder(nn.Module):
    """[B, t, H, W, latent_embed_dim] to [B, factor t, H, W, in_out_channels]."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv1 = CausalConv3d(config.latent_embed_dim, widths[-1], bias=True)
        self.res_blocks = _level(widths[-1], widths[-1], config)
        self.block_res_blocks = [
            _level(a, b, config) for a, b in zip((*widths[1:], widths[-1]), widths, strict=True)
        ]
        self.conv_blocks = [
            CausalConv3d(width, 2 * width, bias=True) if double else nn.Identity()
            for width, double in zip(widths[1:], config.temporal_downsample, strict=True)
        ]
        self.norm1 = GroupNorm(widths[0], config.num_groups, EPS)
        self.conv_out = CausalConv3d(widths[0], config.in_out_channels, bias=True)
        self._upsample = config.temporal_downsample

    def layers(self) -> dict[str, nn.Module]:
        """Return the layers between the first and the last by path, in the order of their use."""
        found: dict[str, nn.Module] = {f"res_blocks.{i}": b for i, b in enumerate(self.res_blocks)}
        for i in reversed(range(len(self.block_res_blocks))):
            level = self.block_res_blocks[i]
            found |= {f"block_res_blocks.{i}.{j}": block for j, block in enumerate(level)}
            if i > 0 and self._upsample[i - 1]:
                found[f"{_UPSAMPLING}.{i - 1}"] = self.conv_blocks[i - 1]
        return found

    def __call__(self, z: mx.array, blocks: BlockProvider[Layer] | None = None) -> mx.array:
        """Decode. blocks: provider of `layers`; None means that they are resident."""
        layers = self.layers()
        if blocks is None:
            blocks = ResidentBlocks(list(layers.values()))
        x = self.conv1(z)
        for index, path in enumerate(layers):
            x = blocks.get(index)(x)
            if path.startswith(_UPSAMPLING):
                x = _depth_to_time(x)
            blocks.release(index, x)
        return self.conv_out(self.norm1(x, silu=True))


def _depth_to_time(x: mx.array) -> mx.array:
    """Move channel c·2 + s of frame t to channel c of frame 2t + s."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h, w, c // 2, 2).transpose(0, 1, 5, 2, 3, 4)
    return x.reshape(b, 2 * t, h, w, c // 2)


class TemporalVAE(nn.Module):
    """VAE_Temporal with `networks` ("encoder", "decoder", or both)."""

    def __init__(self, config: TemporalVAEConfig, networks: Sequence[str] = NETWORKS) -> None:
        super().__init__()
        self.config = config
        if "encoder" in networks:
            self.encoder = TemporalEncoder(config)
            self.quant_conv = Pointwise(2 * config.latent_embed_dim, 2 * config.embed_dim)
        if "decoder" in networks:
            self.post_quant_conv = Pointwise(config.embed_dim, config.latent_embed_dim)
            self.decoder = TemporalDecoder(config)

    def encode(self, x: mx.array) -> mx.array:
        """Encode [B, F, H, W, C] to moments [B, ceil(F / factor), H, W, 2 embed_dim].

        Moments are mean, then log-variance. Zero frames are padded in front to a multiple of the
        factor.
        """
        front = -x.shape[1] % self.config.factor
        x = mx.pad(x, [(0, 0), (front, 0), (0, 0), (0, 0), (0, 0)])
        return self.quant_conv(self.encoder(x))

    def decode(
        self, z: mx.array, num_frames: int, blocks: BlockProvider[Layer] | None = None
    ) -> mx.array:
        """Decode [B, t, H, W, embed_dim] to [B, F, H, W, C]; drops the padded frames in front.

        blocks: provider of the decoder's layers; None means that they are resident.
        """
        front = -num_frames % self.config.factor
        return self.decoder(self.post_quant_conv(z), blocks)[:, front:]


#: The reference wraps each convolution in a module, whose name is left out here.
RULES = (
    KeyRule(
        r"(.*\.conv3|encoder\.conv2|quant_conv|post_quant_conv)\.conv\.weight",
        r"\1.weight",
        squeeze=True,
    ),
    KeyRule(r"(.*)\.conv\.weight", r"\1.weight", axes=(2, 3, 4, 0, 1)),
    KeyRule(r"(.*)\.conv\.bias", r"\1.bias"),
)

KEYS = KeyMap(rules=RULES)
