"""STDiT3 in PyTorch, for training only; names are those of the checkpoint.

Mirrors STDiT3 of Open-Sora 1.2.  B batch, C channels, T latent frames, S tokens per frame, L text
tokens; latents are [B, C, T, H, W].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class STDiTConfig:
    """Constructor arguments, named as in the published config.json."""

    hidden_size: int = 128
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: float = 4.0
    in_channels: int = 4
    caption_channels: int = 64
    model_max_length: int = 300
    input_sq_size: int = 512


class _HalfProduct(torch.autograd.Function):
    """x W^T + b with bfloat16 products and float32 results, a quarter faster than autocast's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, half = x.reshape(-1, x.shape[-1]).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(rows, half)
        ctx.shape = x.shape
        return F.linear(rows, half, bias.bfloat16()).float().view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, half = ctx.saved_tensors
        g = gradients[0].reshape(-1, half.shape[0])
        g_half = g.bfloat16()
        return (g_half @ half).float().view(ctx.shape), (g_half.t() @ rows).float(), g.sum(0)


class Linear(nn.Linear):
    """float32, except that training multiplies in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            return _HalfProduct.apply(x, self.weight, self.bias)
        return super().forward(x)


class MLP(nn.Module):
    """fc1, tanh GELU, fc2."""

    def __init__(self, c_in: int, hidden: int, c_out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(c_in, hidden), Linear(hidden, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class HeadNorm(nn.Module):
    """RMS norm of one head, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return y.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Self-attention with normalised heads; rotary positions where a table is given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)
        self.q_norm, self.k_norm = HeadNorm(width // heads), HeadNorm(width // heads)
        self.heads = heads

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]
        if rotary is not None:
            q, k = _rotate(q, rotary), _rotate(k, rotary)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the channel pairs (2 i, 2 i + 1) by the angles of their position."""
    cos, sin = (table.to(x.dtype) for table in rotary)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


class CrossAttention(nn.Module):
    """Attention from latent tokens to the text tokens of the same sample."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q_linear, self.kv_linear = Linear(width, width), Linear(width, 2 * width)
        self.proj, self.heads = Linear(width, width), heads

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.kv_linear(y).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=mask)
        return self.proj(h.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One spatial or temporal block on tokens [B, T, S, C]."""

    def __init__(self, c: STDiTConfig, temporal: bool) -> None:
        super().__init__()
        width, self.temporal = c.hidden_size, temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = Attention(width, c.num_heads)
        self.cross_attn = CrossAttention(width, c.num_heads)
        self.mlp = MLP(width, int(width * c.mlp_ratio), width)

    def forward(
        self, x: Tensor, text: tuple[Tensor, Tensor], t: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """`t` is the modulation [B, T, 1, 6, C] of each frame."""
        b, frames, s, c = x.shape
        m = (self.scale_shift_table + t).unbind(-2)
        h = _norm(x) * (1 + m[1]) + m[0]
        if self.temporal:
            h = self.attn(h.transpose(1, 2).flatten(0, 1), rotary)
            h = h.view(b, s, frames, c).transpose(1, 2)
        else:
            h = self.attn(h.flatten(0, 1), None).view(x.shape)
        x = x + m[2] * h
        x = x + self.cross_attn(x.flatten(1, 2), *text).view(x.shape)
        return x + m[5] * self.mlp(_norm(x) * (1 + m[4]) + m[3])


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Embedder(nn.Module):
    """Scalar -> sinusoids (cosines first) -> two-layer SiLU MLP; used for timestep and fps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
        angle = value.float()[:, None] * rates
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class FinalLayer(nn.Module):
    """Modulated norm and the projection to patches."""

    def __init__(self, width: int, c_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, c_out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, t: Tensor, t0: Tensor, x_mask: Tensor) -> Tensor:
        """Kept frames (x_mask false) are modulated twice, first by t, then by t0, as published."""
        shift, scale = (self.scale_shift_table + t[:, None, None, None]).unbind(-2)
        shift0, scale0 = (self.scale_shift_table + t0[:, None, None, None]).unbind(-2)
        x = _norm(x) * (1 + scale) + shift
        kept = _norm(x) * (1 + scale0) + shift0
        return self.linear(torch.where(x_mask[..., None, None], x, kept))


class STDiT3(nn.Module):
    """The velocity network; returns [B, 2 C, T, H, W], of which samplers use the first half."""

    def __init__(self, c: STDiTConfig) -> None:
        super().__init__()
        self.config, width = c, c.hidden_size
        patch = nn.Conv3d(c.in_channels, width, (1, 2, 2), stride=(1, 2, 2))
        self.x_embedder = nn.ModuleDict({"proj": patch})
        self.t_embedder, self.fps_embedder = Embedder(width), Embedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = nn.Module()
        self.y_embedder.y_proj = MLP(c.caption_channels, width, width)
        null = torch.randn(c.model_max_length, c.caption_channels) / c.caption_channels**0.5
        self.y_embedder.register_buffer("y_embedding", null)
        self.spatial_blocks = nn.ModuleList(Block(c, False) for _ in range(c.depth))
        self.temporal_blocks = nn.ModuleList(Block(c, True) for _ in range(c.depth))
        self.final_layer = FinalLayer(width, 8 * c.in_channels)
        self.rope = nn.Module()
        head = width // c.num_heads
        rates = 10000.0 ** (-torch.arange(0, head, 2) / head)
        self.rope.register_buffer("freqs", rates)
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "embedder.mlp" in name or "t_block" in name:
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.xavier_uniform_(self.x_embedder["proj"].weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.fps_embedder.mlp[2].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: tuple[Tensor, Tensor],
        size: tuple[float, float, float],
        x_mask: Tensor | None = None,
    ) -> Tensor:
        """One evaluation.

        `timestep` [B] runs from 0 to 1000, `text` is (embeddings [B, L, caption], mask [B, L] true
        for tokens), `size` (height, width in pixels, fps), `x_mask` [B, T] true where generated.
        """
        height, width = x.shape[-2:]
        x = F.pad(x, (0, width % 2, 0, height % 2))
        b, _, frames, rows, columns = x.shape
        if x_mask is None:
            x_mask = torch.ones(b, frames, dtype=torch.bool)
        fps = self.fps_embedder(torch.full((1,), size[2]))
        t, t0 = self.t_embedder(timestep) + fps, self.t_embedder(torch.zeros(b)) + fps
        per_frame = torch.where(
            x_mask[..., None], self.t_block(t)[:, None], self.t_block(t0)[:, None]
        )
        modulation = per_frame.unflatten(-1, (6, -1))[:, :, None]
        y = self.y_embedder.y_proj(text[0]), text[1][:, None, None]
        angles = torch.arange(frames)[:, None] * self.rope.freqs
        rotary = angles.cos(), angles.sin()
        h = self._patches(x) + self._positions(rows // 2, columns // 2, size)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            h = spatial(h, y, modulation, rotary)
            h = temporal(h, y, modulation, rotary)
        h = self.final_layer(h, t, t0, x_mask).view(b, frames, rows // 2, columns // 2, 2, 2, -1)
        h = h.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, -1, frames, rows, columns)
        return h[..., :height, :width].float()

    def _patches(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, T, S, hidden], as a product: a strided convolution is slow."""
        b, c, frames, rows, columns = x.shape
        x = x.view(b, c, frames, rows // 2, 2, columns // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
        proj = self.x_embedder["proj"]
        x = x.reshape(b, frames, rows * columns // 4, 4 * c)
        return F.linear(x, proj.weight.flatten(1), proj.bias)

    def _positions(self, rows: int, columns: int, size: tuple[float, float, float]) -> Tensor:
        """Sinusoids [S, hidden]: the first half of the channels for columns, the rest for rows."""
        scale = math.sqrt(size[0] * size[1]) / self.config.input_sq_size
        base = round(math.sqrt(rows * columns))
        quarter = self.config.hidden_size // 4
        rates = 10000.0 ** (-torch.arange(quarter) / quarter)

        def axis(count: int) -> Tensor:
            angle = (torch.arange(count) / scale * base / count)[:, None] * rates
            return torch.cat([angle.sin(), angle.cos()], dim=-1)

        x = axis(columns)[None].expand(rows, -1, -1)
        y = axis(rows)[:, None].expand(-1, columns, -1)
        return torch.cat([x, y], dim=-1).flatten(0, 1)
