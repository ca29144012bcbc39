"""Texts that change inside a clip: each latent frame attends to the text of its segment.

The segments of a sample lie one after another along the tokens of its text. A frame between two of
them gets both results, by its shares. Idea: Mask²DiT (https://arxiv.org/abs/2503.19881), here
without training and for cross-attention alone.
Dimension letters: B batch, T frames, S tokens per frame, L text tokens, K segments, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import mlx.core as mx

from mlx_sora.models.ops import attention

#: Text [B, L, C] with its mask [B, 1, 1, L], None if all lengths agree.
PaddedText = tuple[mx.array, mx.array | None]


@dataclass(frozen=True)
class SegmentedText:
    """Texts of one sample, [n, C_text] each, and the share of each in each latent frame, T x K."""

    texts: tuple[mx.array, ...]
    shares: tuple[tuple[float, ...], ...]

    def with_null(self, null_text: Callable[[int], mx.array]) -> SegmentedText:
        """Return the same segments with a null text of the length of each text."""
        return replace(self, texts=tuple(null_text(len(text)) for text in self.texts))


#: States of a sample's text: one for all frames, [n, C_text], or several.
Text = mx.array | SegmentedText


@dataclass(frozen=True)
class FrameTexts:
    """Tokens that each frame attends to.

    mask: boolean [B, 1, 1, L], None if all lengths agree. ends: tokens where the segments end.
    shares: of each segment in each frame, [1, T, 1, K].
    """

    mask: mx.array | None
    ends: tuple[int, ...]
    shares: mx.array

    def __getitem__(self, samples: slice) -> FrameTexts:
        """Return the same of some samples."""
        return self if self.mask is None else replace(self, mask=self.mask[samples])

    def map_frames(self, function: Callable[[mx.array], mx.array]) -> FrameTexts:
        """Return the same of other frames; `function` maps [1, T, 1, K] to them."""
        return replace(self, shares=function(self.shares))

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """Attend from q [B, heads, T · S, d] to the segments of each frame, in k, v [.., L, d]."""
        shares: list[list[float]] = self.shares[0, :, 0].tolist()  # type: ignore[assignment]
        tokens = q.shape[2] // len(shares)
        out = mx.zeros(q.shape, q.dtype)
        for segment, (start, end) in enumerate(pairwise((0, *self.ends))):
            frames = [frame for frame, row in enumerate(shares) if row[segment] > 0]
            if not frames:  # they are another rank's
                continue
            first, last = frames[0], frames[-1] + 1
            rows = slice(first * tokens, last * tokens)
            mask = None if self.mask is None else self.mask[..., start:end]
            own = attention(q[:, :, rows], k[:, :, start:end], v[:, :, start:end], scale, mask)
            weights = mx.array([row[segment] for row in shares[first:last]], own.dtype)
            out = out.at[:, :, rows].add(own * mx.repeat(weights, tokens)[:, None])
        return out


def text_parts(text: Sequence[Text]) -> list[tuple[mx.array, ...]]:
    """Return the texts of all samples, segment by segment; samples agree in their segments."""
    parts = [t.texts if isinstance(t, SegmentedText) else (t,) for t in text]
    return list(zip(*parts, strict=True))


def join_segments(
    text: Text, parts: Sequence[PaddedText]
) -> tuple[mx.array, mx.array | FrameTexts | None]:
    """Return the padded segments as one text [B, L, C], and its mask. text: that of one sample."""
    if not isinstance(text, SegmentedText):
        return parts[0]
    ends = tuple(sum(part.shape[1] for part, _ in parts[: i + 1]) for i in range(len(parts)))
    masks = [mask for _, mask in parts]
    joined = None
    if any(mask is not None for mask in masks):
        full = [mx.ones((len(part), 1, 1, part.shape[1]), mx.bool_) for part, _ in parts]
        joined = mx.concatenate(
            [one if mask is None else mask for mask, one in zip(masks, full, strict=True)], axis=-1
        )
    shares = mx.array(text.shares)[None, :, None]
    return mx.concatenate([part for part, _ in parts], axis=1), FrameTexts(joined, ends, shares)
