"""T5 v1.1 encoder (gated GELU); mirrors transformers' T5EncoderModel as Open-Sora 1.2 uses it.

Dimension letters: B batch, L tokens, D d_model. Norms and softmax are computed in float32, and
attention logits are not scaled. The embedding table can stay on disk: `embedding=False` builds the
network without it, and the caller passes embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from mlx_sora.models import precision
from mlx_sora.models.config import MAX_DEPTH, NetworkConfig, require
from mlx_sora.models.hooks import BlockProvider, ResidentBlocks
from mlx_sora.models.key_map import KeyMap, KeyRule
from mlx_sora.models.layers import Embedding, Linear
from mlx_sora.models.ops import attention, gelu_tanh
from mlx_sora.models.precision import check_text_encoder

#: Bias of padded keys: far below any logit, and too small to overflow when added to one.
MASKED = -1e30

#: Checkpoint name of the token table, for callers that read only the rows they need.
EMBEDDING_KEY = "shared.weight"


@dataclass(frozen=True)
class T5Config(NetworkConfig):
    """Keys of the published config.json of a T5 v1.1 encoder; defaults are T5 v1.1 XXL."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self) -> None:
        require(
            self.feed_forward_proj == "gated-gelu",
            f"feed_forward_proj {self.feed_forward_proj!r} is not T5 v1.1's 'gated-gelu'",
        )
        require(self.num_layers <= MAX_DEPTH, f"num_layers is {self.num_layers}")
        exact = self.relative_attention_num_buckets // 4
        require(
            1 <= exact < self.relative_attention_max_distance,
            "relative_attention_num_buckets must be 4 or more, and max_distance larger",
        )


def position_buckets(length: int, buckets: int, max_distance: int) -> mx.array:
    """Return the bucket of every (query, key) pair by key - query: int32 [length, length].

    Half of the buckets are for keys after the query. Within a half the first distances are exact,
    then logarithmic up to `max_distance`. Computed in Python, so that no backend's log decides at a
    boundary.
    """
    half = buckets // 2
    exact = half // 2
    log_range = math.log(max_distance / exact)

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        # This order of operations gives whole numbers at the boundaries (16, 32, 64).
        return min(half - 1, exact + int(math.log(distance / exact) / log_range * (half - exact)))

    by_offset = [bucket(abs(d)) + (half if d > 0 else 0) for d in range(1 - length, length)]
    position = mx.arange(length)
    return mx.array(by_offset)[position[None, :] - position[:, None] + (length - 1)]


class T5Attention(nn.Module):
    """Multi-head attention without biases; only block 0's has the table of position biases."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.max_distance = config.relative_attention_max_distance
        self.q = Linear(config.d_model, inner, bias=False)
        self.k = Linear(config.d_model, inner, bias=False)
        self.v = Linear(config.d_model, inner, bias=False)
        self.o = Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )

    def position_bias(self, length: int) -> mx.array:
        """Return the bias of every head for `length` tokens: float32 [1, heads, L, L]."""
        table = self.relative_attention_bias.weight.astype(precision.STATISTICS)
        buckets = position_buckets(length, table.shape[0], self.max_distance)
        return table.T[:, buckets][None]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        batch, length, _ = x.shape
        q, k, v = (
            project(x).reshape(batch, length, self.heads, -1).swapaxes(1, 2)
            for project in (self.q, self.k, self.v)
        )
        out = attention(q, k, v, scale=1.0, mask=bias.astype(q.dtype))
        return self.o(out.swapaxes(1, 2).reshape(batch, length, -1))


class GatedGelu(nn.Module):
    """wo(gelu(wi_0 x) · wi_1 x), tanh-approximated GELU, no biases."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate = gelu_tanh(self.wi_0(x))
        # Without this dependency, both layers' weights would be dequantized at once.
        return self.wo(gate * self.wi_1(mx.depends(x, gate)))


class AttentionLayer(nn.Module):
    """x + attention(norm x)."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, has_bias)
        self.layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class FeedForwardLayer(nn.Module):
    """x + feed_forward(norm x)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedGelu(config)
        self.layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    """Attention, then feed-forward, on the residual stream [B, L, D]."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.layer = [AttentionLayer(config, has_bias), FeedForwardLayer(config)]

    def position_bias(self, length: int) -> mx.array:
        """Return the position bias [1, heads, L, L] of all blocks; only block 0 has it."""
        bias: mx.array = self.layer[0].SelfAttention.position_bias(length)
        return bias

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        attend, feed = self.layer
        out: mx.array = feed(attend(x, bias))
        return out


class T5Stack(nn.Module):
    """Blocks and final norm (the checkpoint's `encoder.`)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = [T5Block(config, has_bias=i == 0) for i in range(config.num_layers)]
        self.final_layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)


class T5Encoder(nn.Module):
    """Token embeddings to text states.

    embedding: hold the embedding table. Without it, the caller reads rows of `EMBEDDING_KEY`.
    """

    def __init__(self, config: T5Config, embedding: bool = True) -> None:
        super().__init__()
        self.config = config
        if embedding:
            self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)

    def embed(self, ids: mx.array) -> mx.array:
        """Return the embeddings [B, L, D] of token ids [B, L] from the resident table."""
        out: mx.array = self.shared(ids)
        return out

    def __call__(
        self,
        embeds: mx.array,
        mask: mx.array | None = None,
        blocks: BlockProvider[T5Block] | None = None,
    ) -> mx.array:
        """Return the text states [B, L, D] of embeddings [B, L, D].

        Args:
            mask: [B, L], non-zero for tokens, zero for padding; None means no padding. Padded
                positions are computed, but no token attends to them.
            blocks: provider of the blocks; None means that they are resident.

        Raises UsageError for embeddings in float16, in which T5 overflows.
        """
        check_text_encoder(embeds.dtype)
        if blocks is None:
            blocks = ResidentBlocks(self.encoder.block)
        x, bias = embeds, mx.array(0.0)
        for index in range(self.config.num_layers):
            block = blocks.get(index)
            if index == 0:
                bias = block.position_bias(x.shape[1])
                if mask is not None:
                    bias = mx.where(mask.astype(mx.bool_)[:, None, None, :], bias, MASKED)
                bias = bias.astype(x.dtype)  # once, not in each block
            x = block(x, bias)
            blocks.release(index, x)
        out: mx.array = self.encoder.final_layer_norm(x)
        return out


#: A decoder, its head and copies of the embedding table are not used.
KEYS = KeyMap(
    rules=(
        KeyRule(r"(encoder|decoder)\.embed_tokens\.weight|decoder\..*|lm_head\..*", ignore=True),
    )
)
