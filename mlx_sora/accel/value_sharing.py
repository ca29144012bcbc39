"""Sharing values: what attention within frames saw on the way to noise is used on the way back.

RF-Edit (arXiv 2411.04746): while a video is inverted, the values of spatial self-attention are
kept; while it is made again under another prompt, the first steps use them in place of their own,
which holds the layout of the source. Here each evaluation takes those kept nearest in flow time.

What is kept stays in memory: `kept_bytes` says how much that will be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_sora.models.hooks import ValueSharing
from mlx_sora.models.stdit3 import STDiT3Config


def captured_bytes(
    config: STDiT3Config, latent: Sequence[int], evaluations: int, itemsize: int
) -> int:
    """Bytes of the values of `evaluations` evaluations of one clip with latents T, H, W."""
    tokens = 1
    for size, patch in zip(latent, config.patch_size, strict=True):
        tokens *= -(-size // patch)
    return evaluations * config.depth * tokens * config.hidden_size * itemsize


@dataclass
class CapturedValues:
    """Values [B · T, heads, S, head size] of every spatial block, by flow time; of one run."""

    _kept: dict[float, dict[int, mx.array]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for blocks in self._kept.values() for v in blocks.values())

    @property
    def evaluations(self) -> int:
        """How many were kept."""
        return len(self._kept)

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()

    def capture(self, t: float) -> ValueSharing:
        """Keeps the values of the evaluation at flow time t, and changes nothing."""
        return _Keep(self._kept.setdefault(t, {}))

    def reuse(self, t: float) -> ValueSharing | None:
        """Hands out what was kept nearest to flow time t; None when nothing was."""
        if not self._kept:
            return None
        return _Share(self._kept[min(self._kept, key=lambda kept: abs(kept - t))])


@dataclass(frozen=True)
class _Keep:
    into: dict[int, mx.array]

    def values(self, v: mx.array, block: int) -> mx.array:
        # A copy of its own, or all of queries and keys would stay with it; evaluated, or the
        # block's weights would.
        kept = mx.contiguous(v)
        mx.eval(kept)
        self.into[block] = kept
        return v


@dataclass(frozen=True)
class _Share:
    kept: dict[int, mx.array]

    def values(self, v: mx.array, block: int) -> mx.array:
        """The kept ones; for both halves of a guided batch where v has twice their samples."""
        kept = self.kept[block]
        return mx.tile(kept, (len(v) // len(kept), 1, 1, 1))
