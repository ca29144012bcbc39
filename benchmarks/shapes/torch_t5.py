"""The T5 v1.1 encoder in PyTorch, for training only; names are those of the checkpoint.

Mirrors transformers' T5EncoderModel with gated GELU: RMS norms, one relative position table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class T5Config:
    """Constructor arguments, named as in the published config.json."""

    vocab_size: int = 32128
    d_model: int = 64
    d_kv: int = 16
    d_ff: int = 128
    num_layers: int = 2
    num_heads: int = 4
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class SelfAttention(nn.Module):
    """Unscaled attention with an additive position bias."""

    def __init__(self, c: T5Config, owns_table: bool) -> None:
        super().__init__()
        inner = c.num_heads * c.d_kv
        self.q = nn.Linear(c.d_model, inner, bias=False)
        self.k = nn.Linear(c.d_model, inner, bias=False)
        self.v = nn.Linear(c.d_model, inner, bias=False)
        self.o = nn.Linear(inner, c.d_model, bias=False)
        if owns_table:
            self.relative_attention_bias = nn.Embedding(
                c.relative_attention_num_buckets, c.num_heads
            )
        self.heads = c.num_heads

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(-1, -2) + bias).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """wo(GELU(wi_0 x) * wi_1 x)."""

    def __init__(self, c: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.wi_1 = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.wo = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, c: T5Config, first: bool) -> None:
        super().__init__()
        attention, forward = nn.Module(), nn.Module()
        attention.SelfAttention = SelfAttention(c, first)
        attention.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)
        forward.DenseReluDense = FeedForward(c)
        forward.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)
        self.layer = nn.ModuleList([attention, forward])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, forward = self.layer
        x = x + attention.SelfAttention(attention.layer_norm(x), bias)
        return x + forward.DenseReluDense(forward.layer_norm(x))


class T5Encoder(nn.Module):
    """ids [B, L] and mask [B, L] (1 = token) -> embeddings [B, L, d_model]."""

    def __init__(self, c: T5Config) -> None:
        super().__init__()
        self.config = c
        self.shared = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(Block(c, i == 0) for i in range(c.num_layers))
        self.encoder.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(self._buckets(ids.shape[1])).permute(2, 0, 1)[None]
        bias = bias.masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
        x = self.shared(ids)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)

    def _buckets(self, length: int) -> Tensor:
        """Bucket of (query, key) [L, L]: near distances exact, far ones logarithmic."""
        place = torch.arange(length)
        relative = place[None] - place[:, None]
        half = self.config.relative_attention_num_buckets // 2
        exact, far = half // 2, self.config.relative_attention_max_distance
        distance = relative.abs()
        log = torch.log(distance.clamp(min=1).float() / exact) / math.log(far / exact)
        large = (exact + (log * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(distance < exact, distance, large) + half * (relative > 0)
