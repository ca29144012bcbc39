"""The spatial VAE: single frames to latents of an eighth of their height and width, and back.

Mirrors diffusers' AutoencoderKL (the layout of the SDXL VAE). Channels last: frames [N, H, W, 3],
latents [N, h, w, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from mlx_sora.models import ops
from mlx_sora.models.config import MAX_DEPTH, NetworkConfig, require
from mlx_sora.models.conv import Conv2d, Downsample2d, GroupNorm, Pointwise, Upsample2d
from mlx_sora.models.key_map import KeyMap, KeyRule

#: Epsilon of every group norm.
EPS = 1e-6

#: Networks of a VAE, which can be built alone.
NETWORKS = ("encoder", "decoder")


@dataclass(frozen=True)
class SpatialVAEConfig(NetworkConfig):
    """Constructor arguments of AutoencoderKL; defaults are SDXL's."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    act_fn: str = "silu"

    def __post_init__(self) -> None:
        known = self.act_fn in ("silu", "swish")
        require(known, f"act_fn {self.act_fn!r} is not known (only silu is)")
        layers = self.layers_per_block
        require(layers <= MAX_DEPTH, f"layers_per_block is {layers}")

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))


class ResnetBlock(nn.Module):
    """Norm, SiLU, conv, twice, plus the (projected) input."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inputs, groups, EPS)
        self.conv1 = Conv2d(inputs, outputs)
        self.norm2 = GroupNorm(outputs, groups, EPS)
        self.conv2 = Conv2d(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = Pointwise(inputs, outputs)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.conv1(self.norm1(x, silu=True))
        y = self.conv2(self.norm2(y, silu=True))
        return (self.conv_shortcut(x) if "conv_shortcut" in self else x) + y


class Attention(nn.Module):
    """Single-head attention over all positions of an image, plus the input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(channels, groups, EPS)
        self.to_q = Pointwise(channels, channels)
        self.to_k = Pointwise(channels, channels)
        self.to_v = Pointwise(channels, channels)
        self.to_out = [Pointwise(channels, channels)]

    def __call__(self, x: mx.array) -> mx.array:
        n, h, w, c = x.shape
        y = self.group_norm(x).reshape(n, 1, h * w, c)
        y = ops.attention(self.to_q(y), self.to_k(y), self.to_v(y), c**-0.5)
        return x + self.to_out[0](y).reshape(n, h, w, c)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = [ResnetBlock(channels, channels, groups) for _ in range(2)]
        self.attentions = [Attention(channels, groups)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nn.Module):
    """Residual blocks, then half the size, except in the last block."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, *, last: bool) -> None:
        super().__init__()
        self.resnets = _resnets(inputs, outputs, layers, groups)
        if not last:
            self.downsamplers = [Downsample2d(outputs)]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.resnets:
            x = block(x)
        return self.downsamplers[0](x) if "downsamplers" in self else x


class UpBlock(nn.Module):
    """Residual blocks, then twice the size, except in the last block."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, *, last: bool) -> None:
        super().__init__()
        self.resnets = _resnets(inputs, outputs, layers, groups)
        if not last:
            self.upsamplers = [Upsample2d(outputs)]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.resnets:
            x = block(x)
        return self.upsamplers[0](x) if "upsamplers" in self else x


def _resnets(inputs: int, outputs: int, count: int, groups: int) -> list[ResnetBlock]:
    return [ResnetBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(count)]


class SpatialEncoder(nn.Module):
    """Frames to mean and log-variance, before the quant conv."""

    def __init__(self, config: SpatialVAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0])
        self.down_blocks = [
            DownBlock(a, b, config.layers_per_block, groups, last=i == len(widths) - 1)
            for i, (a, b) in enumerate(zip((widths[0], *widths), widths, strict=False))
        ]
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = GroupNorm(widths[-1], groups, EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), silu=True))


class SpatialDecoder(nn.Module):
    """Latents to frames; one residual block more per level than the encoder."""

    def __init__(self, config: SpatialVAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = [
            UpBlock(a, b, config.layers_per_block + 1, groups, last=i == len(widths) - 1)
            for i, (a, b) in enumerate(zip((widths[0], *widths), widths, strict=False))
        ]
        self.conv_norm_out = GroupNorm(widths[-1], groups, EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels)

    def __call__(self, z: mx.array) -> mx.array:
        return self.decode_upper_levels(self.decode_first_level(z))

    def decode_first_level(self, z: mx.array) -> mx.array:
        """Run attention and upsampling level 0, whose activations are small."""
        return self.up_blocks[0](self.mid_block(self.conv_in(z)))

    def decode_upper_levels(self, x: mx.array) -> mx.array:
        """Run upsampling levels 1..n. Local apart from group norm, so it can be tiled."""
        for block in self.up_blocks[1:]:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class SpatialVAE(nn.Module):
    """AutoencoderKL with `networks` ("encoder", "decoder", or both)."""

    def __init__(self, config: SpatialVAEConfig, networks: Sequence[str] = NETWORKS) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        if "encoder" in networks:
            self.encoder = SpatialEncoder(config)
            self.quant_conv = Pointwise(2 * channels, 2 * channels)
        if "decoder" in networks:
            self.post_quant_conv = Pointwise(channels, channels)
            self.decoder = SpatialDecoder(config)

    def encode(self, x: mx.array) -> mx.array:
        """Encode frames [N, H, W, 3] to moments [N, H//f, W//f, 2C]: mean, then log-variance."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: mx.array) -> mx.array:
        """Decode latents [N, h, w, C] to frames [N, f h, f w, 3], nominally in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


_ATTENTION = r"(.*\battentions\.\d+\.)"

#: Linear layers may be stored as 1x1 convolutions. Older files name those of attention differently.
RULES = (
    *(
        KeyRule(rf"{_ATTENTION}{old}\.(weight|bias)", rf"\1{new}.\2", squeeze=True)
        for old, new in (
            ("query", "to_q"),
            ("key", "to_k"),
            ("value", "to_v"),
            ("proj_attn", r"to_out.0"),
        )
    ),
    KeyRule(rf"{_ATTENTION}to_(q|k|v|out\.0)\.weight", squeeze=True),
    KeyRule(r"(.*\.)?(conv_shortcut|quant_conv|post_quant_conv)\.weight", squeeze=True),
    KeyRule(r".*\bconv(1|2|_in|_out)?\.weight", axes=(2, 3, 0, 1)),
)

KEYS = KeyMap(rules=RULES)
