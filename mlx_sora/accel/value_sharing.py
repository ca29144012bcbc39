"""Value sharing: an edit reuses attention values of the inversion, to keep the layout.

RF-Edit (arXiv 2411.04746): the inversion of a video stores the values of spatial self-attention;
the first steps under the new prompt use them instead of their own. Each evaluation takes the values
that were stored nearest in flow time. They stay in memory: see `captured_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_sora.models.hooks import ValueSharing
from mlx_sora.models.stdit3 import STDiT3Config


def captured_bytes(
    config: STDiT3Config, latent: Sequence[int], evaluations: int, itemsize: int
) -> int:
    """Return the bytes of the values of `evaluations` evaluations of one clip.

    latent: T, H, W of its latents.
    """
    patches = (-(-size // patch) for size, patch in zip(latent, config.patch_size, strict=True))
    return evaluations * config.depth * math.prod(patches) * config.hidden_size * itemsize


@dataclass
class CapturedValues:
    """Values [B · T, heads, S, head size] of every spatial block of one run, by flow time."""

    _values: dict[float, dict[int, mx.array]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(v.nbytes for blocks in self._values.values() for v in blocks.values())

    @property
    def evaluations(self) -> int:
        """Number of evaluations with values."""
        return len(self._values)

    def clear(self) -> None:
        """Drop all values."""
        self._values.clear()

    def capture(self, t: float) -> ValueSharing:
        """Return a hook that stores the values of the evaluation at flow time t."""
        return _Capture(self._values.setdefault(t, {}))

    def reuse(self, t: float) -> ValueSharing | None:
        """Return a hook with the values nearest to flow time t; None without any values."""
        if not self._values:
            return None
        return _Reuse(self._values[min(self._values, key=lambda time: abs(time - t))])


@dataclass(frozen=True)
class _Capture:
    captured: dict[int, mx.array]

    def values(self, v: mx.array, block: int) -> mx.array:
        # Copied, or all of queries and keys would stay in memory with the slice. Evaluated, or the
        # block's weights would.
        copy = mx.contiguous(v)
        mx.eval(copy)
        self.captured[block] = copy
        return v


@dataclass(frozen=True)
class _Reuse:
    captured: dict[int, mx.array]

    def values(self, v: mx.array, block: int) -> mx.array:
        """Return the captured values, repeated where v has both samples of CFG."""
        captured = self.captured[block]
        return mx.tile(captured, (len(v) // len(captured), 1, 1, 1))
