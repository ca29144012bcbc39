"""Windows of a long video: overlapping parts whose velocities are averaged.

All frames are denoised together, but the network sees one window at a time, which is as long as a
clip. Where windows overlap, one takes over from the other along a ramp (MultiDiffusion, arXiv
2302.08113, over time as in DiTCtrl, arXiv 2412.18597). Lengths count latent frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from mlx_sora.geometry import MICRO_FRAME_SIZE, latent_frames
from mlx_sora.sampling.base import Step, Velocity

CHUNK = latent_frames(MICRO_FRAME_SIZE)


@dataclass(frozen=True)
class Windows:
    """Windows of `length` latent frames; each begins `stride` after the one before.

    Both are multiples of a chunk of the VAE. ramps: for each window but the first, latent frames
    in which it takes over from the one before, around the middle of what they share. 0 switches at
    the start of the chunk nearest to that, of two the later one.
    """

    length: int
    stride: int
    ramps: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """Number of windows."""
        return len(self.ramps) + 1

    @property
    def frames(self) -> int:
        """Latent frames of the whole video."""
        return self.length + (self.count - 1) * self.stride

    def __str__(self) -> str:
        # Each overlap is evaluated in two windows.
        work = self.count * self.length / self.frames
        return (
            f"{self.count} windows of {self.length} latent frames, one every {self.stride}: "
            f"{work:.2f} times the work of the {self.frames} frames alone"
        )

    def span(self, index: int) -> slice:
        """Return the frames of window `index`."""
        return slice(index * self.stride, index * self.stride + self.length)

    @cached_property
    def weights(self) -> list[mx.array]:
        """Weights of each window's frames, [length]; those of one frame add up to 1."""
        found, following = list[mx.array](), mx.zeros(self.frames)
        for index in reversed(range(self.count)):
            # A wide ramp does not wait for a later window that takes over earlier.
            share = mx.maximum(self._share_from(index), following)
            found.append((share - following)[self.span(index)])
            following = share
        return found[::-1]

    def _share_from(self, index: int) -> mx.array:
        """Return the share [frames] of window `index` and all later ones."""
        if index == 0:
            return mx.ones(self.frames)
        middles = mx.arange(self.frames) + 0.5
        start, overlap, ramp = index * self.stride, self.length - self.stride, self.ramps[index - 1]
        if ramp == 0:
            chunks = overlap // CHUNK
            return (middles > start + (chunks - chunks // 2) * CHUNK).astype(mx.float32)
        return mx.clip((middles - start - overlap / 2) / ramp + 0.5, 0, 1)


def _of_one_rank(x: mx.array) -> mx.array:
    return x[None]


@dataclass(frozen=True)
class WindowedVelocity:
    """Velocity of a long video from the velocity of each of its windows. Fills `Velocity`.

    Each of `ranks` evaluates one window at a time, the next as many windows later; windows without
    a frame that moves are left out. all_gather: returns the x of all ranks as [ranks, *x.shape].
    The sum is that of a single process, to the last bit.
    """

    windows: Windows
    velocities: Sequence[Velocity]
    rank: int = 0
    ranks: int = 1
    all_gather: Callable[[mx.array], mx.array] = _of_one_rank

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        """Return v [B, T, H, W, C] at z and flow times t [B], inside `step`."""
        total, count = mx.zeros(z.shape), self.windows.count
        for first in range(0, count, self.ranks):
            own = self._weighted(first + self.rank, z, t, step)
            mx.eval(own)
            side_by_side = range(first, min(first + self.ranks, count))
            for index, v in zip(side_by_side, self.all_gather(own), strict=False):
                total[:, self.windows.span(index)] += v
            mx.eval(total)
        return total

    def _weighted(self, index: int, z: mx.array, t: mx.array, step: Step) -> mx.array:
        """Return what window `index` adds to its frames; 0 if there is no such window."""
        span = self.windows.span(index)
        if index < self.windows.count:
            part = step.select(span)
            if part.x_mask is None or part.x_mask.any().item():
                weights = self.windows.weights[index][:, None, None, None]
                return weights * self.velocities[index](z[:, span], t, part)
        return mx.zeros((len(z), self.windows.length, *z.shape[2:]))
