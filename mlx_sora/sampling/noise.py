"""Random latents with explicit keys: the noise of a sample depends only on its seed.

MLX's global random state and the other samples of a batch do not affect it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.geometry import Size


@dataclass(frozen=True)
class Noise:
    """Standard normal draws float32 [B, *shape], one seed (0 .. 2^64 - 1) per sample.

    shape: T, H, W, C of one sample's latents. clip: number of the clip; every clip has other noise.
    """

    seeds: Sequence[int]
    shape: Sequence[int]
    clip: int = 0

    def initial(self) -> mx.array:
        """Return the latents at the start of a run."""
        return self._draw(0)

    def __call__(self, index: int) -> mx.array:
        """Return the noise for frames that start in step `index`."""
        return self._draw(index + 1)

    def _draw(self, number: int) -> mx.array:
        # Changing one word of a counter-based generator's key gives an independent stream.
        word = mx.array([self.clip, number], mx.uint32)
        streams = [mx.random.split(mx.random.key(seed))[0] ^ word for seed in self.seeds]
        return mx.stack([mx.random.normal(self.shape, key=key) for key in streams])


@dataclass(frozen=True)
class SecondPass:
    """The second of two passes, which begins in step `first_step`, at flow time `start`.

    strength: share of noise there. first_size: pixels of the first pass.
    """

    first_size: Size
    strength: float
    first_step: int
    start: float
