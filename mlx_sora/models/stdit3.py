"""STDiT3, the spatial-temporal diffusion transformer; mirrors STDiT3 of Open-Sora 1.2.

Two phases, so that nothing is computed twice: `prepare` once per run (text, position, frame rate;
each block's text keys and values at its first use), then the forward once per step.
Dimension letters: B batch, T frames, H W latent height and width, S tokens per frame, L text
tokens, C hidden channels. Latents are [B, T, H, W, channels].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
from mlx import nn

from mlx_sora.errors import UsageError
from mlx_sora.models.context import Context, ResidentBlocks, Share, Whole
from mlx_sora.models.keys import CONV3D, KeyMap, Rule
from mlx_sora.models.precision import KEEP
from mlx_sora.models.stdit3_blocks import (
    CaptionEmbedder,
    FinalLayer,
    KeysValues,
    PatchEmbedder,
    Rope,
    ScalarEmbedder,
    SiLU,
    STDiT3Block,
    STDiT3Config,
    position_embedding,
)

__all__ = ["KEYS", "BlockPair", "Conditions", "STDiT3", "STDiT3Config", "unpadded"]

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
    still: tuple[mx.array, mx.array]
    keys_values: dict[int, tuple[KeysValues, KeysValues]] = field(default_factory=dict)


def unpadded(y: mx.array, mask: mx.array | None) -> list[mx.array]:
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
        rates = mx.array(fps, KEEP.times).reshape(-1)
        rates = mx.tile(rates, len(text) // rates.size)
        fps_embedding = self.fps_embedder(rates, self.dtype)
        still = self.t_embedder(mx.zeros(len(text)), self.dtype) + fps_embedding
        packed = self.y_embedder.y_proj(mx.concatenate(list(text)).astype(self.dtype))
        return Conditions(
            *_padded(packed, lengths),
            position=position,
            fps=fps_embedding,
            still=(still, self._modulation(still)),
        )

    def __call__(
        self,
        z: mx.array,
        t: mx.array,
        conditions: Conditions,
        x_mask: mx.array | None = None,
        context: Context[BlockPair] | None = None,
    ) -> mx.array:
        """Prediction float32 [B, T, H, W, out_channels] for latents z at times t [B] in [0, 1000].

        x_mask [B, T]: false frames are taken to be at t = 0. context: what fills the seams.
        """
        context = context or Context()
        embedding = self.t_embedder(t, self.dtype) + conditions.fps
        modulation = _six(self._modulation(embedding))
        if x_mask is not None:
            x_mask = x_mask.astype(mx.bool_)
            still = _six(conditions.still[1])
            modulation = mx.where(x_mask[:, :, None, None], modulation, still)
        x = self.x_embedder(z.astype(self.dtype)).astype(KEEP.residual) + conditions.position
        stack = context.stack
        known = None if stack is None else stack.instead(x, t, x_mask)
        share: Share = Whole()
        if known is not None:
            x = x + known
        else:
            share = context.layout.share(x.shape[:3], context.tokens.stride)
            tokens, x = x, self._blocks(share.enter(x), modulation, conditions, context, share)
            if stack is not None:
                x, share = share.whole(x), Whole()
                stack.computed(tokens, x)
        mask = None if x_mask is None else x_mask[share.rows]
        out = self.final_layer(
            x, embedding[share.rows], conditions.still[0][share.rows], mask, self.dtype
        )
        # Gathered as patches, which are far fewer bytes than tokens.
        out = share.whole(out)
        return self._unpatchify(out.astype(KEEP.residual), z.shape[1:4])

    def _modulation(self, embedding: mx.array) -> mx.array:
        for layer in self.t_block:
            embedding = layer(embedding)
        return embedding

    def _blocks(
        self,
        x: mx.array,
        modulation: mx.array,
        conditions: Conditions,
        context: Context[BlockPair],
        share: Share,
    ) -> mx.array:
        """Tokens x [b, t, S, C] of a share to [b, T, s, C]; modulation [B, 1 or T, 6, C]."""
        modulation = modulation[share.rows]
        pairs = list(zip(self.spatial_blocks, self.temporal_blocks, strict=True))
        blocks = context.blocks or ResidentBlocks(pairs)
        mask = None if conditions.text_mask is None else conditions.text_mask[share.rows]
        rest = (mask, self.rope, context.tokens)
        for index in range(self.config.depth):
            spatial, temporal = blocks.get(index)
            if index not in conditions.keys_values:
                text = conditions.text[share.rows]
                both = spatial.cross_attn.keys_values(text), temporal.cross_attn.keys_values(text)
                conditions.keys_values[index] = both
            first, second = conditions.keys_values[index]
            values = context.values
            # Bound to the block's number; blocks along time keep their values.
            own = None if values is None else partial(values.values, block=index)
            x = x if index == 0 else share.to_frames(x)
            x = spatial(x, share.frames(modulation), first, *rest, own)
            x = temporal(share.to_space(x), modulation, second, *rest)
            blocks.done(index, x)
        return x

    def _unpatchify(self, x: mx.array, grid: Sequence[int]) -> mx.array:
        """Tokens [B, T', S, patch values] back to [B, T, H, W, channels], padding cut off."""
        pt, ph, pw = self.config.patch_size
        frames, rows, columns = (-(-n // p) for n, p in zip(grid, (pt, ph, pw), strict=True))
        x = x.reshape(x.shape[0], frames, rows, columns, pt, ph, pw, -1)
        x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
        x = x.reshape(x.shape[0], frames * pt, rows * ph, columns * pw, -1)
        return x[:, : grid[0], : grid[1], : grid[2]]


def _six(modulation: mx.array) -> mx.array:
    """[B, 6C] to float32 [B, 1, 6, C]."""
    return modulation.astype(KEEP.modulation).reshape(modulation.shape[0], 1, 6, -1)


def _padded(packed: mx.array, lengths: Sequence[int]) -> tuple[mx.array, mx.array | None]:
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
    rules=(Rule(r"x_embedder\.proj\.weight", axes=CONV3D, flatten=True),),
    optional=frozenset({"rope.freqs"}),
)
