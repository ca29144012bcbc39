"""The two-stage video VAE in PyTorch, for training only; names are those of the checkpoint.

Mirrors diffusers' AutoencoderKL and VAE_Temporal / VideoAutoencoderPipeline of Open-Sora 1.2.
Layouts: images [N, C, H, W], videos [B, C, T, H, W], values in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_FACTOR = 0.18215


@dataclass(frozen=True)
class SpatialConfig:
    """Constructor arguments of the spatial VAE."""

    block_out_channels: tuple[int, ...] = (16, 16, 32, 64)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 8


@dataclass(frozen=True)
class TemporalConfig:
    """Constructor arguments of the temporal VAE."""

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 32
    num_res_blocks: int = 1
    channel_multipliers: tuple[int, ...] = (1, 1, 1, 2)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 8


class ResBlock2d(nn.Module):
    """norm, SiLU, conv, twice, plus the input."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)
        self.same = c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.same else self.conv_shortcut(x))


class Attention2d(nn.Module):
    """Single-head self-attention over pixels, with residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (m(h)[:, None] for m in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock2d(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention2d(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Conv(nn.Module):
    """A convolution under the name `conv`; stride 2 pads right and bottom only."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1 if stride == 1 else 0)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Residual blocks of one resolution and the change to the next one."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, change: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResBlock2d(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)]
        )
        if change == "down":
            self.downsamplers = nn.ModuleList([_Conv(c_out, 2)])
        elif change == "up":
            self.upsamplers = nn.ModuleList([_Conv(c_out, 1)])
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        if self.change == "down":
            return self.downsamplers[0](x)
        return self.upsamplers[0](x) if self.change == "up" else x


class Encoder2d(nn.Module):
    """[N, 3, H, W] -> [N, 2 * latent, H / 8, W / 8]."""

    def __init__(self, c: SpatialConfig) -> None:
        super().__init__()
        widths, groups = c.block_out_channels, c.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(
                widths[max(i - 1, 0)],
                width,
                c.layers_per_block,
                groups,
                "down" if i < len(widths) - 1 else "",
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder2d(nn.Module):
    """[N, latent, h, w] -> [N, 3, 8 h, 8 w]."""

    def __init__(self, c: SpatialConfig) -> None:
        super().__init__()
        widths, groups = c.block_out_channels[::-1], c.norm_num_groups
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            _Level(
                widths[max(i - 1, 0)],
                width,
                c.layers_per_block + 1,
                groups,
                "up" if i < len(widths) - 1 else "",
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class SpatialVAE(nn.Module):
    """diffusers' AutoencoderKL, without any latent factor."""

    def __init__(self, c: SpatialConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder2d(c), Decoder2d(c)
        n = c.latent_channels
        self.quant_conv = nn.Conv2d(2 * n, 2 * n, 1)
        self.post_quant_conv = nn.Conv2d(n, n, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [N, latent, h, w]."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class CausalConv3d(nn.Module):
    """3-D convolution that pads time at the front only."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 3, bias: bool = True, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, kernel, stride=(stride, 1, 1), bias=bias)
        side = kernel // 2
        self.pad = (side, side, side, side, kernel - 1 + (1 - stride), 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad) if self.conv.kernel_size[0] > 1 else x)


class ResBlock3d(nn.Module):
    """norm, SiLU, causal conv, twice, plus the input; no biases in the convolutions."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = CausalConv3d(c_in, c_out, bias=False)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = CausalConv3d(c_out, c_out, bias=False)
        if c_in != c_out:
            self.conv3 = CausalConv3d(c_in, c_out, 1, bias=False)
        self.same = c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.same else self.conv3(x))


def _stack(c_in: int, c_out: int, count: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock3d(c_in if i == 0 else c_out, c_out, groups) for i in range(count))


class Encoder3d(nn.Module):
    """[B, 4, T, h, w] -> [B, 2 * embed, T / 4, h, w]; T is a multiple of 4."""

    def __init__(self, c: TemporalConfig) -> None:
        super().__init__()
        widths = [c.filters * m for m in c.channel_multipliers]
        self.down = c.temporal_downsample
        self.conv_in = CausalConv3d(c.in_out_channels, c.filters, bias=False)
        self.block_res_blocks, self.conv_blocks = nn.ModuleList(), nn.ModuleList()
        previous = c.filters
        for i, width in enumerate(widths):
            self.block_res_blocks.append(_stack(previous, width, c.num_res_blocks, c.num_groups))
            if i < len(self.down):
                down = CausalConv3d(width, width, stride=2) if self.down[i] else nn.Identity()
                self.conv_blocks.append(down)
            previous = width
        self.res_blocks = _stack(previous, previous, c.num_res_blocks, c.num_groups)
        self.norm1 = nn.GroupNorm(c.num_groups, previous, eps=1e-5)
        self.conv2 = CausalConv3d(previous, 2 * c.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, stack in enumerate(self.block_res_blocks):
            for block in stack:
                x = block(x)
            if i < len(self.down):
                x = self.conv_blocks[i](x)
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(F.silu(self.norm1(x)))


class Decoder3d(nn.Module):
    """[B, embed, T, h, w] -> [B, 4, 4 T, h, w]."""

    def __init__(self, c: TemporalConfig) -> None:
        super().__init__()
        widths = [c.filters * m for m in c.channel_multipliers]
        top, self.down = widths[-1], c.temporal_downsample
        self.conv1 = CausalConv3d(c.embed_dim, top)
        self.res_blocks = _stack(top, top, c.num_res_blocks, c.num_groups)
        stacks, ups = [], []
        for i in reversed(range(len(widths))):
            above = widths[min(i + 1, len(widths) - 1)]
            stacks.append(_stack(above, widths[i], c.num_res_blocks, c.num_groups))
            if i > 0:
                wide = CausalConv3d(widths[i], 2 * widths[i]) if self.down[i - 1] else nn.Identity()
                ups.append(wide)
        self.block_res_blocks = nn.ModuleList(stacks[::-1])
        self.conv_blocks = nn.ModuleList(ups[::-1])
        self.norm1 = nn.GroupNorm(c.num_groups, widths[0], eps=1e-5)
        self.conv_out = CausalConv3d(widths[0], c.in_out_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv1(z)
        for block in self.res_blocks:
            x = block(x)
        for i in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[i]:
                x = block(x)
            if i > 0 and self.down[i - 1]:
                x = _to_time(self.conv_blocks[i - 1](x))
        return self.conv_out(F.silu(self.norm1(x)))


def _to_time(x: Tensor) -> Tensor:
    """Channel 2 c + s becomes frame 2 t + s."""
    b, c, t, h, w = x.shape
    return x.view(b, c // 2, 2, t, h, w).transpose(2, 3).reshape(b, c // 2, 2 * t, h, w)


class TemporalVAE(nn.Module):
    """VAE_Temporal: compresses time by four, causally."""

    def __init__(self, c: TemporalConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder3d(c), Decoder3d(c)
        self.quant_conv = CausalConv3d(2 * c.latent_embed_dim, 2 * c.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(c.embed_dim, c.embed_dim, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, embed, ceil(T / 4), h, w]; zero frames are padded in front."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % 4, 0))
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor, frames: int) -> Tensor:
        return self.decoder(self.post_quant_conv(z))[:, :, -frames % 4 :]


class VideoVAE(nn.Module):
    """VideoAutoencoderPipeline: spatial over frames, temporal over chunks of 17 frames."""

    scale: Tensor
    shift: Tensor

    def __init__(self, spatial: SpatialConfig, temporal: TemporalConfig, chunk: int = 17) -> None:
        super().__init__()
        self.spatial_vae = nn.Module()
        self.spatial_vae.module = SpatialVAE(spatial)
        self.temporal_vae = TemporalVAE(temporal)
        self.register_buffer("scale", torch.ones(1, 4, 1, 1, 1))
        self.register_buffer("shift", torch.zeros(1, 4, 1, 1, 1))
        self.chunk = chunk

    @property
    def spatial(self) -> SpatialVAE:
        module = self.spatial_vae.module
        assert isinstance(module, SpatialVAE)
        return module

    def encode(self, x: Tensor) -> Tensor:
        """Mean latents [B, 4, T', H / 8, W / 8] of [B, 3, F, H, W], normalised."""
        b = x.shape[0]
        mean, _ = self.spatial.moments(x.transpose(1, 2).flatten(0, 1))
        z = mean.unflatten(0, (b, -1)).transpose(1, 2) * LATENT_FACTOR
        z = torch.cat([self.temporal_vae.moments(c)[0] for c in z.split(self.chunk, dim=2)], dim=2)
        return (z - self.shift) / self.scale

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """[B, 3, frames, H, W] of normalised latents."""
        z = z * self.scale + self.shift
        latents, parts = (self.chunk + 3) // 4, []
        for i, part in enumerate(z.split(latents, dim=2)):
            count = min(self.chunk, frames - i * self.chunk)
            parts.append(self.temporal_vae.decode(part, count))
        x = torch.cat(parts, dim=2) / LATENT_FACTOR
        x = self.spatial.decode(x.transpose(1, 2).flatten(0, 1))
        return x.unflatten(0, (z.shape[0], -1)).transpose(1, 2)
