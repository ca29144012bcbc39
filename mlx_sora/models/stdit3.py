"""STDiT3, the spatial-temporal diffusion transformer; mirrors STDiT3 of Open-Sora 1.2.

Two phases, so that nothing is computed twice: `prepare` once per run (text, position, frame rate;
each block's text keys and values at its first use), then the forward once per step.
Dimension letters: B batch, T frames, H W latent height and width, S tokens per frame, L text
tokens, C hidden channels. Latents are [B, T, H, W, channels].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_sora.errors import UsageError
from mlx_sora.models import precision
from mlx_sora.models.config import MAX_DEPTH, read_config, require
from mlx_sora.models.hooks import Hooks, ResidentBlocks, Shard, TokenMerging, Unsharded
from mlx_sora.models.key_map import CONV3D, KeyMap, KeyRule
from mlx_sora.models.ops import add_gated, apply_in_slices, attention, gelu_tanh, modulate, silu
from mlx_sora.models.quantized import dequantize_once

#: Width of the sinusoids that times and frame rates become, and their longest period.
FREQUENCIES = 256
MAX_PERIOD = 10000.0

#: What attention is to use in place of its values, [B', heads, L, head size] as they are.
ValueFn = Callable[[mx.array], mx.array]

#: Text keys and values of one attention, each [B, heads, L, head size].
KeysValues = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class STDiT3Config:
    """Published config.json keys that shape the network; defaults are STDiT3-XL/2."""

    input_sq_size: int = 512
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    pred_sigma: bool = True
    caption_channels: int = 4096
    model_max_length: int = 300
    qk_norm: bool = True

    def __post_init__(self) -> None:
        require(self.depth <= MAX_DEPTH, f"depth is {self.depth}")
        require(len(self.patch_size) == 3, f"patch_size {list(self.patch_size)} is not [t, h, w]")
        require(
            self.num_heads > 0
            and self.hidden_size % (2 * self.num_heads) == 0
            and self.hidden_size % 4 == 0,
            f"hidden_size {self.hidden_size} does not fit {self.num_heads} heads",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> STDiT3Config:
        """From a config.json; unknown keys are ignored."""
        return read_config(cls, values)

    @classmethod
    def xl_2(cls) -> STDiT3Config:
        """STDiT3-XL/2, the published Open-Sora 1.2 (1.2 B parameters)."""
        return cls()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: velocity, and with pred_sigma as many again."""
        return self.in_channels * (2 if self.pred_sigma else 1)


def timestep_embedding(values: mx.array) -> mx.array:
    """Cosines, then sines, of float32 values [B]: [B, FREQUENCIES]."""
    half = FREQUENCIES // 2
    steps = mx.arange(half, dtype=precision.TIMES)
    angles = values.astype(precision.TIMES)[:, None] * mx.exp(
        steps * (-math.log(MAX_PERIOD) / half)
    )
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


def position_embedding(rows: int, columns: int, channels: int, scale: float) -> mx.array:
    """Position of each token of a frame, row-major: float32 [rows * columns, channels].

    The first half of the channels encodes the column, the second the row; sines before cosines.
    scale: image side over the training side, so that larger images get finer coordinates.
    """
    base = round(math.sqrt(rows * columns))
    exponents = mx.arange(0, channels // 2, 2, dtype=precision.TIMES) / (channels // 2)
    frequencies = 1.0 / mx.power(mx.array(MAX_PERIOD), exponents)

    def encode(count: int) -> mx.array:
        at = mx.arange(count, dtype=precision.TIMES) / scale * (base / count)
        angles = at[:, None] * frequencies
        return mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)

    shape = (rows, columns, channels // 2)
    column = mx.broadcast_to(encode(columns)[None], shape)
    row = mx.broadcast_to(encode(rows)[:, None], shape)
    return mx.concatenate([column, row], axis=-1).reshape(rows * columns, channels)


class SiLU(nn.Module):
    """x · sigmoid(x), as a member of a layer list."""

    def __call__(self, x: mx.array) -> mx.array:
        return silu(x)


class ScalarEmbedder(nn.Module):
    """Sinusoids of a number, then linear, SiLU, linear: [B] to [B, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = [nn.Linear(FREQUENCIES, channels), SiLU(), nn.Linear(channels, channels)]

    def __call__(self, values: mx.array, dtype: mx.Dtype) -> mx.array:
        x = timestep_embedding(values).astype(dtype)
        for layer in self.mlp:
            x = layer(x)
        return x


class Mlp(nn.Module):
    """fc2(gelu(fc1 x)), tanh-approximated GELU."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def __call__(self, x: mx.array) -> mx.array:
        fc1, fc2 = dequantize_once(self.fc1, x), dequantize_once(self.fc2, x)
        return apply_in_slices(lambda rows: fc2(gelu_tanh(fc1(rows))), x, row_bytes=4 * self.hidden)


class CaptionEmbedder(nn.Module):
    """Text states to hidden channels; holds the learned text of no prompt."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.y_proj = Mlp(config.caption_channels, config.hidden_size, config.hidden_size)
        self.y_embedding = mx.zeros((config.model_max_length, config.caption_channels))
        self.freeze(keys=["y_embedding"])


class PatchEmbedder(nn.Module):
    """Non-overlapping patches of latents to tokens: zero-pad at the end, reshape, one matmul."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Linear(math.prod(config.patch_size) * config.in_channels, config.hidden_size)

    def __call__(self, z: mx.array) -> mx.array:
        """[B, T, H, W, channels] to [B, T', S, C]."""
        pads = [(0, -n % p) for n, p in zip(z.shape[1:4], self.patch_size, strict=True)]
        z = mx.pad(z, [(0, 0), *pads, (0, 0)])
        batch, frames, height, width, channels = z.shape
        pt, ph, pw = self.patch_size
        z = z.reshape(batch, frames // pt, pt, height // ph, ph, width // pw, pw, channels)
        z = z.transpose(0, 1, 3, 5, 2, 4, 6, 7)
        out: mx.array = self.proj(z.reshape(batch, frames // pt, -1, pt * ph * pw * channels))
        return out


class Rope(nn.Module):
    """Rotary frequencies [head size / 2], stored in published checkpoints though constant."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.freqs = mx.power(mx.array(MAX_PERIOD), -mx.arange(0, head_dim, 2) / head_dim)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate interleaved pairs of x [..., T, head size] by position 0..T-1."""
        periods = 1.0 / self.freqs.astype(precision.TIMES)
        return mx.fast.rope(
            x, x.shape[-1], traditional=True, base=None, scale=1.0, offset=0, freqs=periods
        )


class SelfAttention(nn.Module):
    """Attention within each frame, or (temporal) along time at each place of the frame."""

    def __init__(self, config: STDiT3Config, temporal: bool) -> None:
        super().__init__()
        channels = config.hidden_size
        self.heads, self.temporal = config.num_heads, temporal
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6)

    def __call__(self, x: mx.array, rope: Rope, value_fn: ValueFn | None = None) -> mx.array:
        """[B, T, S, C] to [B, T, S, C]; rope serves temporal attention only."""
        batch, frames, tokens, channels = x.shape
        outer, inner = (tokens, frames) if self.temporal else (frames, tokens)
        order = (3, 0, 2, 4, 1, 5) if self.temporal else (3, 0, 1, 4, 2, 5)
        qkv = self.qkv(x).reshape(batch, frames, tokens, 3, self.heads, -1).transpose(order)
        q, k, v = qkv.reshape(3, batch * outer, self.heads, inner, -1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.temporal and frames > 1:
            q, k = rope(q), rope(k)
        if value_fn is not None:
            v = value_fn(v)
        out = attention(q, k, v, scale=q.shape[-1] ** -0.5)
        out = out.reshape(batch, outer, self.heads, inner, -1)
        out = out.transpose((0, 3, 1, 2, 4) if self.temporal else (0, 1, 3, 2, 4))
        result: mx.array = self.proj(out.reshape(batch, frames, tokens, channels))
        return result


class CrossAttention(nn.Module):
    """Video tokens attend to text tokens; no norms, no rotation."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        channels = config.hidden_size
        self.heads = config.num_heads
        self.q_linear = nn.Linear(channels, channels)
        self.kv_linear = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def keys_values(self, text: mx.array) -> KeysValues:
        """Keys and values of text [B, L, C], laid out once for all steps."""
        kv = self.kv_linear(text).reshape(*text.shape[:2], 2, self.heads, -1)
        k, v = mx.contiguous(kv.transpose(2, 0, 3, 1, 4))
        return k, v

    def __call__(self, x: mx.array, text: KeysValues, mask: mx.array | None) -> mx.array:
        """[B, T, S, C] to [B, T, S, C]; mask boolean [B, 1, 1, L]."""
        batch, channels = x.shape[0], x.shape[-1]
        q = self.q_linear(x).reshape(batch, -1, self.heads, channels // self.heads)
        out = attention(q.swapaxes(1, 2), *text, scale=q.shape[-1] ** -0.5, mask=mask)
        result: mx.array = self.proj(out.swapaxes(1, 2).reshape(x.shape))
        return result


class STDiT3Block(nn.Module):
    """Gated self-attention, cross-attention, gated MLP; the stream stays float32.

    dtype: type of what goes into the matrix products.
    """

    def __init__(self, config: STDiT3Config, temporal: bool, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        channels = config.hidden_size
        self.dtype = dtype
        self.scale_shift_table = mx.zeros((6, channels))
        self.norm1 = nn.LayerNorm(channels, eps=1e-6, affine=False)
        self.attn = SelfAttention(config, temporal)
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6, affine=False)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio), channels)

    def __call__(
        self,
        x: mx.array,
        modulation: mx.array,
        text: KeysValues,
        mask: mx.array | None,
        rope: Rope,
        token_merging: TokenMerging,
        value_fn: ValueFn | None = None,
    ) -> mx.array:
        """x [B, T, S, C], modulation float32 [B, 1 or T, 6, C] to x [B, T, S, C].

        exchange: of the self-attention's values.
        """
        frames = x.shape[1]
        table = self.scale_shift_table.astype(precision.MODULATION) + modulation
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mx.split(table, 6, axis=2)
        h = token_merging.merge(modulate(self.norm1(x), shift, scale).astype(self.dtype))
        x = add_gated(x, gate, token_merging.unmerge(self.attn(h, rope, value_fn), frames))
        h = token_merging.merge(x.astype(self.dtype))
        x = x + token_merging.unmerge(self.cross_attn(h, text, mask), frames)
        h = modulate(self.norm2(x), mlp_shift, mlp_scale).astype(self.dtype)
        return add_gated(x, mlp_gate, self.mlp(h))


class FinalLayer(nn.Module):
    """Norm, modulation by time, and the projection to patches."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.scale_shift_table = mx.zeros((2, config.hidden_size))
        self.norm_final = nn.LayerNorm(config.hidden_size, eps=1e-6, affine=False)
        self.linear = nn.Linear(
            config.hidden_size, math.prod(config.patch_size) * config.out_channels
        )

    def _norm_modulate(self, x: mx.array, t: mx.array) -> mx.array:
        """Normalised x [B, T, S, C], shifted and scaled by the time embedding t [B, C]."""
        table = (
            self.scale_shift_table.astype(precision.MODULATION)
            + t.astype(precision.MODULATION)[:, None]
        )
        shift, scale = mx.split(table[:, None], 2, axis=2)
        return modulate(self.norm_final(x), shift, scale)

    def __call__(
        self, x: mx.array, t: mx.array, t0: mx.array, x_mask: mx.array | None, dtype: mx.Dtype
    ) -> mx.array:
        """Patches [B, T, S, patch values]; x_mask [B, T] boolean, false takes `still` for t."""
        x = self._norm_modulate(x, t)
        if x_mask is not None:
            # The reference modulates still frames twice: first by t, then by t = 0.
            x = mx.where(x_mask[:, :, None, None], x, self._norm_modulate(x, t0))
        out: mx.array = self.linear(x.astype(dtype))
        return out


#: What a block provider hands out: spatial and temporal block of one depth.
BlockPair = tuple[STDiT3Block, STDiT3Block]


@dataclass(frozen=True)
class Conditions:
    """What stays the same over the steps of a run.

    text [B, L, C] after the text MLP; text_mask boolean [B, 1, 1, L], None when all lengths agree;
    position [S, C]; fps [B, C]; still: embedding [B, C] and modulation [B, 6C] of frames at t = 0
    (lazy: costs nothing unless a mask asks for it). keys_values fills as blocks are first used, for
    the samples of this process's share.
    """

    text: mx.array
    text_mask: mx.array | None
    position: mx.array
    fps: mx.array
    t0: tuple[mx.array, mx.array]
    keys_values: dict[int, tuple[KeysValues, KeysValues]] = field(default_factory=dict)


def drop_padding(y: mx.array, mask: mx.array | None) -> list[mx.array]:
    """Text of each sample without padding: y [B, L, C] to a list of [n_i, C].

    mask [b, L], non-zero for tokens; with b < B it is repeated, so that the null half of a guidance
    batch is cut to the lengths of the prompts. None keeps everything.
    """
    if mask is None:
        return list(y)
    rows: list[list[int]] = mask.tolist()  # type: ignore[assignment]
    kept = [mx.array([i for i, keep in enumerate(row) if keep], mx.int32) for row in rows]
    return [sample[kept[i % len(kept)]] for i, sample in enumerate(y)]


class STDiT3(nn.Module):
    """Velocity of latents under text. dtype: type of what goes into the matrix products."""

    def __init__(self, config: STDiT3Config, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        channels = config.hidden_size
        self.config, self.dtype = config, dtype
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = ScalarEmbedder(channels)
        self.fps_embedder = ScalarEmbedder(channels)
        self.t_block = [SiLU(), nn.Linear(channels, 6 * channels)]
        self.y_embedder = CaptionEmbedder(config)
        self.rope = Rope(config.head_dim)
        self.spatial_blocks = [STDiT3Block(config, False, dtype) for _ in range(config.depth)]
        self.temporal_blocks = [STDiT3Block(config, True, dtype) for _ in range(config.depth)]
        self.final_layer = FinalLayer(config)

    def null_text(self, length: int) -> mx.array:
        """Text of no prompt: the first `length` rows of the learned embedding, [length, C_text]."""
        return self.y_embedder.y_embedding[:length]

    def prepare(
        self,
        text: Sequence[mx.array],
        grid: Sequence[int],
        *,
        height: float,
        width: float,
        fps: float | mx.array,
    ) -> Conditions:
        """Everything about a run that its steps share.

        text: one array [n_i, C_text] per sample, without padding. grid: latent T, H, W.
        height, width: pixels. fps: a number, or one per sample (repeated when the batch is a
        multiple). Raises UsageError for a sample without text tokens.
        """
        lengths = [len(sample) for sample in text]
        if not lengths or min(lengths) == 0:
            raise UsageError("A sample without text tokens cannot be denoised.", "Give a prompt.")
        _, ph, pw = self.config.patch_size
        side = math.sqrt(height * width)
        position = position_embedding(
            -(-grid[1] // ph),
            -(-grid[2] // pw),
            self.config.hidden_size,
            side / self.config.input_sq_size,
        )
        rates = mx.array(fps, precision.TIMES).reshape(-1)
        rates = mx.tile(rates, len(text) // rates.size)
        fps_embedding = self.fps_embedder(rates, self.dtype)
        still = self.t_embedder(mx.zeros(len(text)), self.dtype) + fps_embedding
        packed = self.y_embedder.y_proj(mx.concatenate(list(text)).astype(self.dtype))
        return Conditions(
            *_pad_text(packed, lengths),
            position=position,
            fps=fps_embedding,
            t0=(still, self._modulation(still)),
        )

    def __call__(
        self,
        z: mx.array,
        t: mx.array,
        conditions: Conditions,
        x_mask: mx.array | None = None,
        hooks: Hooks[BlockPair] | None = None,
    ) -> mx.array:
        """Prediction float32 [B, T, H, W, out_channels] for latents z at times t [B] in [0, 1000].

        x_mask [B, T]: false frames are taken to be at t = 0. context: what fills the seams.
        """
        hooks = hooks or Hooks()
        embedding = self.t_embedder(t, self.dtype) + conditions.fps
        modulation = _reshape_modulation(self._modulation(embedding))
        if x_mask is not None:
            x_mask = x_mask.astype(mx.bool_)
            still = _reshape_modulation(conditions.t0[1])
            modulation = mx.where(x_mask[:, :, None, None], modulation, still)
        x = self.x_embedder(z.astype(self.dtype)).astype(precision.RESIDUAL) + conditions.position
        stack = hooks.block_cache
        known = None if stack is None else stack.cached_residual(x, t, x_mask)
        share: Shard = Unsharded()
        if known is not None:
            x = x + known
        else:
            share = hooks.sharding.shard(x.shape[:3], hooks.token_merging.stride)
            tokens, x = x, self._run_blocks(share.scatter(x), modulation, conditions, hooks, share)
            if stack is not None:
                x, share = share.gather(x), Unsharded()
                stack.update(tokens, x)
        mask = None if x_mask is None else x_mask[share.batch_slice]
        out = self.final_layer(
            x, embedding[share.batch_slice], conditions.t0[0][share.batch_slice], mask, self.dtype
        )
        # Gathered as patches, which are far fewer bytes than tokens.
        out = share.gather(out)
        return self._unpatchify(out.astype(precision.RESIDUAL), z.shape[1:4])

    def _modulation(self, embedding: mx.array) -> mx.array:
        for layer in self.t_block:
            embedding = layer(embedding)
        return embedding

    def _run_blocks(
        self,
        x: mx.array,
        modulation: mx.array,
        conditions: Conditions,
        hooks: Hooks[BlockPair],
        share: Shard,
    ) -> mx.array:
        """Tokens x [b, t, S, C] of a share to [b, T, s, C]; modulation [B, 1 or T, 6, C]."""
        modulation = modulation[share.batch_slice]
        pairs = list(zip(self.spatial_blocks, self.temporal_blocks, strict=True))
        blocks = hooks.blocks or ResidentBlocks(pairs)
        mask = None if conditions.text_mask is None else conditions.text_mask[share.batch_slice]
        rest = (mask, self.rope, hooks.token_merging)
        for index in range(self.config.depth):
            spatial, temporal = blocks.get(index)
            if index not in conditions.keys_values:
                text = conditions.text[share.batch_slice]
                both = spatial.cross_attn.keys_values(text), temporal.cross_attn.keys_values(text)
                conditions.keys_values[index] = both
            first, second = conditions.keys_values[index]
            values = hooks.value_sharing
            # Bound to the block's number; blocks along time keep their values.
            own = None if values is None else partial(values.values, block=index)
            x = x if index == 0 else share.to_spatial(x)
            x = spatial(x, share.scatter_frames(modulation), first, *rest, own)
            x = temporal(share.to_temporal(x), modulation, second, *rest)
            blocks.release(index, x)
        return x

    def _unpatchify(self, x: mx.array, grid: Sequence[int]) -> mx.array:
        """Tokens [B, T', S, patch values] back to [B, T, H, W, channels], padding cut off."""
        pt, ph, pw = self.config.patch_size
        frames, rows, columns = (-(-n // p) for n, p in zip(grid, (pt, ph, pw), strict=True))
        x = x.reshape(x.shape[0], frames, rows, columns, pt, ph, pw, -1)
        x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
        x = x.reshape(x.shape[0], frames * pt, rows * ph, columns * pw, -1)
        return x[:, : grid[0], : grid[1], : grid[2]]


def _reshape_modulation(modulation: mx.array) -> mx.array:
    """[B, 6C] to float32 [B, 1, 6, C]."""
    return modulation.astype(precision.MODULATION).reshape(modulation.shape[0], 1, 6, -1)


def _pad_text(packed: mx.array, lengths: Sequence[int]) -> tuple[mx.array, mx.array | None]:
    """Text [sum of lengths, C] as [B, L, C], with a mask [B, 1, 1, L] where lengths differ."""
    longest = max(lengths)
    if min(lengths) == longest:
        return packed.reshape(len(lengths), longest, -1), None
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    rows = [
        mx.pad(packed[end - n : end], [(0, longest - n), (0, 0)])
        for end, n in zip(ends, lengths, strict=True)
    ]
    mask = mx.arange(longest)[None] < mx.array(list(lengths))[:, None]
    return mx.stack(rows), mask[:, None, None, :]


#: The patch convolution becomes a matrix; rotary constants may be absent.
KEYS = KeyMap(
    rules=(KeyRule(r"x_embedder\.proj\.weight", axes=CONV3D, flatten=True),),
    optional=frozenset({"rope.freqs"}),
)
