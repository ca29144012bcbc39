"""STDiT3, the spatial-temporal diffusion transformer; mirrors STDiT3 of Open-Sora 1.2.

`prepare` computes once per run what all steps share: text, position and frame rate. Each block adds
its text keys and values at its first use. `__call__` is the forward pass of one step.
Dimension letters: B batch, T frames, H W latent height and width, S tokens per frame, L text
tokens, C hidden channels. Latents are [B, T, H, W, channels].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
from mlx import nn

from mlx_sora.errors import UsageError
from mlx_sora.models import ops, precision
from mlx_sora.models.config import MAX_DEPTH, NetworkConfig, require
from mlx_sora.models.hooks import Hooks, ResidentBlocks, Shard, SiteMerging, Unsharded
from mlx_sora.models.key_map import CONV3D, KeyMap, KeyRule
from mlx_sora.models.layers import Linear
from mlx_sora.models.ops import add_gated, apply_in_slices, attention, gelu_tanh, modulate, silu
from mlx_sora.models.quantized import dequantize_once, select_outputs
from mlx_sora.models.text_segments import FrameTexts, Text, join_segments, text_parts

#: Width of the sinusoidal embedding of times and frame rates, and its longest period.
FREQUENCIES = 256
MAX_PERIOD = 10000.0

#: Checkpoint name of the kernel that embeds patches, [hidden, channels, *patch_size].
PATCH_KEY = "x_embedder.proj.weight"

#: Merging at each site of one block.
MergingAt = Callable[[str], SiteMerging]

#: Maps the values [B', heads, L, head size] of a self-attention to those it uses.
ValueFn = Callable[[mx.array], mx.array]

#: Text keys and values of one attention, each [B, heads, L, head size].
KeysValues = tuple[mx.array, mx.array]

#: Text tokens that count: boolean [B, 1, 1, L], None for all; or those of each frame.
TextMask = mx.array | FrameTexts | None


@dataclass(frozen=True)
class STDiT3Config(NetworkConfig):
    """Keys of a config.json that shape the network; defaults are STDiT3-XL/2 (1.2 B parameters)."""

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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: the velocity, and with pred_sigma as many again."""
        return self.in_channels * (2 if self.pred_sigma else 1)


def timestep_embedding(values: mx.array) -> mx.array:
    """Embed values [B] as cosines, then sines, in float32: [B, FREQUENCIES]."""
    half = FREQUENCIES // 2
    steps = mx.arange(half, dtype=precision.TIMES)
    angles = values.astype(precision.TIMES)[:, None] * mx.exp(
        steps * (-math.log(MAX_PERIOD) / half)
    )
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


def position_embedding(rows: int, columns: int, channels: int, scale: float) -> mx.array:
    """Return the position of each token of a frame, row-major: float32 [rows * columns, channels].

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
    """x · sigmoid(x) as a layer."""

    def __call__(self, x: mx.array) -> mx.array:
        return silu(x)


class ScalarEmbedder(nn.Module):
    """Sinusoidal embedding of a number, then linear, SiLU, linear: [B] to [B, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = [Linear(FREQUENCIES, channels), SiLU(), Linear(channels, channels)]

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
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, out)

    def __call__(self, x: mx.array) -> mx.array:
        fc1, fc2 = dequantize_once(self.fc1, x), dequantize_once(self.fc2, x)
        return apply_in_slices(lambda rows: fc2(gelu_tanh(fc1(rows))), x, row_bytes=4 * self.hidden)


class CaptionEmbedder(nn.Module):
    """Text states to hidden channels; holds the learned null text."""

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
        self.proj = Linear(math.prod(config.patch_size) * config.in_channels, config.hidden_size)

    def __call__(self, z: mx.array) -> mx.array:
        """Embed [B, T, H, W, channels] as tokens [B, T', S, C]."""
        pads = [(0, -n % p) for n, p in zip(z.shape[1:4], self.patch_size, strict=True)]
        z = mx.pad(z, [(0, 0), *pads, (0, 0)])
        batch, frames, height, width, channels = z.shape
        pt, ph, pw = self.patch_size
        z = z.reshape(batch, frames // pt, pt, height // ph, ph, width // pw, pw, channels)
        z = z.transpose(0, 1, 3, 5, 2, 4, 6, 7)
        out: mx.array = self.proj(z.reshape(batch, frames // pt, -1, pt * ph * pw * channels))
        return out


class Rope(nn.Module):
    """Rotary frequencies [head size / 2]; constant, but stored in published checkpoints."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.freqs = mx.power(mx.array(MAX_PERIOD), -mx.arange(0, head_dim, 2) / head_dim)
        self.freeze()

    def __call__(self, x: mx.array, positions: mx.array | None = None) -> mx.array:
        """Rotate interleaved pairs of x [..., T, head size] by position [T]; None: 0..T-1."""
        if positions is not None:
            angles = positions.astype(precision.TIMES)[:, None] * self.freqs.astype(precision.TIMES)
            cos, sin = mx.cos(angles), mx.sin(angles)
            even, odd = x[..., ::2], x[..., 1::2]
            rotated = mx.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
            return rotated.reshape(x.shape).astype(x.dtype)
        periods = 1.0 / self.freqs.astype(precision.TIMES)
        return mx.fast.rope(
            x, x.shape[-1], traditional=True, base=None, scale=1.0, offset=0, freqs=periods
        )


class SelfAttention(nn.Module):
    """Attention within each frame, or (temporal) along time at each position of the frame."""

    def __init__(self, config: STDiT3Config, temporal: bool) -> None:
        super().__init__()
        channels = config.hidden_size
        self.heads, self.temporal = config.num_heads, temporal
        self.qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6)

    def __call__(
        self, x: mx.array, rope: Rope, merging_at: MergingAt, value_fn: ValueFn | None = None
    ) -> mx.array:
        """Attend over x [B, T, S, C]. Only temporal attention uses rope."""
        site, length = "temporal" if self.temporal else "spatial", x.shape[1]
        whole, keys = merging_at(site), merging_at(f"{site}-kv")
        h = whole.merge(x)
        merged = keys.merge(h)
        if merged is h:
            q, k, v = self._heads(self.qkv, h, 3)
        else:
            channels = x.shape[-1]
            (q,) = self._heads(select_outputs(self.qkv, slice(channels)), h, 1)
            k, v = self._heads(select_outputs(self.qkv, slice(channels, None)), merged, 2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.temporal and length > 1:
            at = whole.positions(length)
            q, k = rope(q, at), rope(k, at if merged is h else keys.positions(length))
        elif merged is not h:  # every frame attends to the merged keys of its own
            k, v = (self._for_frames(each, keys, len(x), h.shape[1]) for each in (k, v))
        if value_fn is not None:
            v = value_fn(v)
        out = attention(q, k, v, scale=q.shape[-1] ** -0.5)
        batch, frames, tokens, channels = h.shape
        outer, inner = (tokens, frames) if self.temporal else (frames, tokens)
        out = out.reshape(batch, outer, self.heads, inner, -1)
        out = out.transpose((0, 3, 1, 2, 4) if self.temporal else (0, 1, 3, 2, 4))
        out = ops.linear(self.proj, out.reshape(batch, frames, tokens, channels))
        return whole.unmerge(out, length)

    def _heads(self, layer: nn.Module, x: mx.array, parts: int) -> mx.array:
        """Project x [B, T, S, C] to [parts, B', heads, L, head size]."""
        batch, frames, tokens, _ = x.shape
        outer, inner = (tokens, frames) if self.temporal else (frames, tokens)
        order = (3, 0, 2, 4, 1, 5) if self.temporal else (3, 0, 1, 4, 2, 5)
        found = ops.linear(layer, x).reshape(batch, frames, tokens, parts, self.heads, -1)
        return found.transpose(order).reshape(parts, batch * outer, self.heads, inner, -1)

    def _for_frames(self, x: mx.array, keys: SiteMerging, batch: int, frames: int) -> mx.array:
        """Repeat keys or values [B · T', heads, S, head size] for each frame of a pair."""
        rows = x.reshape(batch, -1, 1, x.shape[1] * x.shape[2] * x.shape[3])
        return keys.unmerge(rows, frames).reshape(batch * frames, *x.shape[1:])


class CrossAttention(nn.Module):
    """Attention of video tokens to text tokens; no norms, no rotation."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        channels = config.hidden_size
        self.heads = config.num_heads
        self.q_linear = Linear(channels, channels)
        self.kv_linear = Linear(channels, 2 * channels)
        self.proj = Linear(channels, channels)

    def keys_values(self, text: mx.array) -> KeysValues:
        """Return keys and values of text [B, L, C], in the layout that all steps use."""
        kv = self.kv_linear(text).reshape(*text.shape[:2], 2, self.heads, -1)
        k, v = mx.contiguous(kv.transpose(2, 0, 3, 1, 4))
        return k, v

    def __call__(self, x: mx.array, text: KeysValues, mask: TextMask) -> mx.array:
        """Attend from x [B, T, S, C] to the text."""
        batch, channels = x.shape[0], x.shape[-1]
        q = ops.linear(self.q_linear, x).reshape(batch, -1, self.heads, channels // self.heads)
        q, scale = q.swapaxes(1, 2), q.shape[-1] ** -0.5
        if isinstance(mask, FrameTexts):
            out = mask.attend(q, *text, scale)
        else:
            out = attention(q, *text, scale=scale, mask=mask)
        return ops.linear(self.proj, out.swapaxes(1, 2).reshape(x.shape))


class STDiT3Block(nn.Module):
    """Gated self-attention, cross-attention and gated MLP on the float32 residual stream.

    dtype: type of the operands of matrix products.
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
        mask: TextMask,
        rope: Rope,
        merging_at: MergingAt,
        value_fn: ValueFn | None = None,
    ) -> mx.array:
        """Return x [B, T, S, C] after the block.

        modulation: float32 [B, 1 or T, 6, C]. value_fn: replaces the values of the self-attention.
        """
        frames, cross, mlp = x.shape[1], merging_at("cross"), merging_at("mlp")
        table = self.scale_shift_table.astype(precision.MODULATION) + modulation
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mx.split(table, 6, axis=2)
        h = modulate(self.norm1(x), shift, scale).astype(self.dtype)
        x = add_gated(x, gate, self.attn(h, rope, merging_at, value_fn))
        h = cross.merge(x.astype(self.dtype))
        mask = mask.map_frames(cross.merge) if isinstance(mask, FrameTexts) else mask
        x = x + cross.unmerge(self.cross_attn(h, text, mask), frames)
        h = mlp.merge(modulate(self.norm2(x), mlp_shift, mlp_scale).astype(self.dtype))
        return add_gated(x, mlp_gate, mlp.unmerge(self.mlp(h), frames))


class FinalLayer(nn.Module):
    """Norm, modulation by time, and projection to patches."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.scale_shift_table = mx.zeros((2, config.hidden_size))
        self.norm_final = nn.LayerNorm(config.hidden_size, eps=1e-6, affine=False)
        self.linear = Linear(config.hidden_size, math.prod(config.patch_size) * config.out_channels)

    def _norm_modulate(self, x: mx.array, t: mx.array) -> mx.array:
        """Normalize x [B, T, S, C], then shift and scale it by the time embedding t [B, C]."""
        table = (
            self.scale_shift_table.astype(precision.MODULATION)
            + t.astype(precision.MODULATION)[:, None]
        )
        shift, scale = mx.split(table[:, None], 2, axis=2)
        return modulate(self.norm_final(x), shift, scale)

    def __call__(
        self, x: mx.array, t: mx.array, t0: mx.array, x_mask: mx.array | None, dtype: mx.Dtype
    ) -> mx.array:
        """Return patches [B, T, S, patch values]; where x_mask [B, T] is false, t0 replaces t."""
        x = self._norm_modulate(x, t)
        if x_mask is not None:
            # The reference modulates masked frames twice: first by t, then by t = 0.
            x = mx.where(x_mask[:, :, None, None], x, self._norm_modulate(x, t0))
        out: mx.array = self.linear(x.astype(dtype))
        return out


#: Spatial and temporal block of one depth, which a block provider hands out together.
BlockPair = tuple[STDiT3Block, STDiT3Block]


@dataclass(frozen=True)
class Conditions:
    """Inputs of the network that all steps of a run share.

    text: [B, L, C], after the text MLP. text_mask: None if all tokens count in every frame.
    position: [S, C]. fps: [B, C]. t0, t0_mlp: embedding [B, C] and modulation [B, 6C] of frames at
    t = 0, evaluated only if a mask needs them. keys_values: those of each block for the samples of
    this rank, added at the block's first use.
    """

    text: mx.array
    text_mask: TextMask
    position: mx.array
    fps: mx.array
    t0: mx.array
    t0_mlp: mx.array
    keys_values: dict[int, tuple[KeysValues, KeysValues]] = field(default_factory=dict)


class STDiT3(nn.Module):
    """Predicts the velocity of latents. dtype: type of the operands of matrix products."""

    def __init__(self, config: STDiT3Config, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        channels = config.hidden_size
        self.config, self.dtype = config, dtype
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = ScalarEmbedder(channels)
        self.fps_embedder = ScalarEmbedder(channels)
        self.t_block = [SiLU(), Linear(channels, 6 * channels)]
        self.y_embedder = CaptionEmbedder(config)
        self.rope = Rope(config.head_dim)
        self.spatial_blocks = [STDiT3Block(config, False, dtype) for _ in range(config.depth)]
        self.temporal_blocks = [STDiT3Block(config, True, dtype) for _ in range(config.depth)]
        self.final_layer = FinalLayer(config)

    def null_text(self, length: int) -> mx.array:
        """Return the first `length` rows of the learned null embedding, [length, C_text]."""
        return self.y_embedder.y_embedding[:length]

    def prepare(
        self,
        text: Sequence[Text],
        grid: Sequence[int],
        *,
        height: float,
        width: float,
        fps: float | mx.array,
    ) -> Conditions:
        """Compute what the steps of a run share.

        Args:
            text: one array [n_i, C_text] per sample, without padding; or segments.
            grid: latent T, H, W.
            height, width: pixels.
            fps: a number, or one per sample (repeated if the batch is a multiple).

        Raises UsageError for a sample without text tokens.
        """
        parts = text_parts(text)
        if not parts or not all(len(one) for part in parts for one in part):
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
        t0 = self.t_embedder(mx.zeros(len(text)), self.dtype) + fps_embedding
        padded = [
            _pad_text(
                self.y_embedder.y_proj(mx.concatenate([*part]).astype(self.dtype)),
                [*map(len, part)],
            )
            for part in parts
        ]
        return Conditions(
            *join_segments(text[0], padded),
            position=position,
            fps=fps_embedding,
            t0=t0,
            t0_mlp=self._time_modulation(t0),
        )

    def __call__(
        self,
        z: mx.array,
        t: mx.array,
        conditions: Conditions,
        x_mask: mx.array | None = None,
        hooks: Hooks[BlockPair] | None = None,
    ) -> mx.array:
        """Predict float32 [B, T, H, W, out_channels] for latents z at times t [B] in [0, 1000].

        x_mask: [B, T]; false frames are at t = 0. hooks: techniques of this run.
        """
        hooks = hooks or Hooks()
        t_emb = self.t_embedder(t, self.dtype) + conditions.fps
        modulation = _split_modulation(self._time_modulation(t_emb))
        if x_mask is not None:
            x_mask = x_mask.astype(mx.bool_)
            t0_modulation = _split_modulation(conditions.t0_mlp)
            modulation = mx.where(x_mask[:, :, None, None], modulation, t0_modulation)
        x = self.x_embedder(z.astype(self.dtype)).astype(precision.RESIDUAL) + conditions.position
        cache = hooks.block_cache
        residual = None if cache is None else cache.cached_residual(x, t, x_mask)
        shard: Shard = Unsharded()
        if residual is not None:
            x = x + residual
        else:
            shard = hooks.sharding.shard(x.shape[:3], hooks.token_merging.stride)
            tokens, x = x, self._run_blocks(shard.scatter(x), modulation, conditions, hooks, shard)
            if cache is not None:
                x, shard = shard.gather(x), Unsharded()
                cache.update(tokens, x)
        samples = shard.batch_slice
        mask = None if x_mask is None else x_mask[samples]
        out = self.final_layer(x, t_emb[samples], conditions.t0[samples], mask, self.dtype)
        # Patches are gathered instead of tokens because they are far fewer bytes.
        out = shard.gather(out)
        return self._unpatchify(out.astype(precision.RESIDUAL), z.shape[1:4])

    def _time_modulation(self, embedding: mx.array) -> mx.array:
        for layer in self.t_block:
            embedding = layer(embedding)
        return embedding

    def _run_blocks(
        self,
        x: mx.array,
        modulation: mx.array,
        conditions: Conditions,
        hooks: Hooks[BlockPair],
        shard: Shard,
    ) -> mx.array:
        """Map tokens x [b, t, S, C] of a shard to [b, T, s, C]; modulation [B, 1 or T, 6, C]."""
        samples, sharing = shard.batch_slice, hooks.value_sharing
        modulation = modulation[samples]
        pairs = list(zip(self.spatial_blocks, self.temporal_blocks, strict=True))
        blocks = hooks.blocks or ResidentBlocks(pairs)
        mask = None if conditions.text_mask is None else conditions.text_mask[samples]
        own = mask.map_frames(shard.scatter_frames) if isinstance(mask, FrameTexts) else mask
        for index in range(self.config.depth):
            spatial, temporal = blocks.get(index)
            if index not in conditions.keys_values:
                text = conditions.text[samples]
                both = spatial.cross_attn.keys_values(text), temporal.cross_attn.keys_values(text)
                conditions.keys_values[index] = both
            spatial_text, temporal_text = conditions.keys_values[index]
            rest = (self.rope, partial(hooks.token_merging.at, index))
            # Only spatial blocks share values.
            value_fn = None if sharing is None else partial(sharing.values, block=index)
            x = x if index == 0 else shard.to_spatial(x)
            x = spatial(x, shard.scatter_frames(modulation), spatial_text, own, *rest, value_fn)
            x = temporal(shard.to_temporal(x), modulation, temporal_text, mask, *rest)
            blocks.release(index, x)
            if hooks.on_block is not None or ops.is_large_pass(x):
                mx.eval(x)
            if hooks.on_block is not None:
                hooks.on_block(index)
        return x

    def _unpatchify(self, x: mx.array, grid: Sequence[int]) -> mx.array:
        """Map tokens [B, T', S, patch values] to [B, T, H, W, channels], without padding."""
        pt, ph, pw = self.config.patch_size
        frames, rows, columns = (-(-n // p) for n, p in zip(grid, (pt, ph, pw), strict=True))
        x = x.reshape(x.shape[0], frames, rows, columns, pt, ph, pw, -1)
        x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
        x = x.reshape(x.shape[0], frames * pt, rows * ph, columns * pw, -1)
        return x[:, : grid[0], : grid[1], : grid[2]]


def _split_modulation(modulation: mx.array) -> mx.array:
    """Reshape [B, 6C] to float32 [B, 1, 6, C]."""
    return modulation.astype(precision.MODULATION).reshape(modulation.shape[0], 1, 6, -1)


def _pad_text(packed: mx.array, lengths: Sequence[int]) -> tuple[mx.array, mx.array | None]:
    """Pad text [sum of lengths, C] to [B, L, C]. Equal lengths need no mask [B, 1, 1, L]."""
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


#: Constants, which published checkpoints hold and others may lack.
_CONSTANTS = frozenset({"rope.freqs"})

#: The patch convolution becomes a matrix.
KEYS = KeyMap(
    rules=(KeyRule(r"x_embedder\.proj\.weight", axes=CONV3D, flatten=True),),
    optional=_CONSTANTS,
    float32=_CONSTANTS,
)
