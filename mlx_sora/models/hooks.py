"""The seams a network may call, each a protocol with its plain default.

The networks know these protocols only; what fills them depends on this module, never the reverse.
State belongs to whoever fills a seam, for one run. The defaults cost nothing and change nothing.
Dimension letters: B batch, T frames, S tokens per frame, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import mlx.core as mx

Block = TypeVar("Block")
Block_co = TypeVar("Block_co", covariant=True)


class BlockProvider(Protocol[Block_co]):
    """Hands out a network's blocks in order, so that not all need be in memory at once."""

    def get(self, index: int) -> Block_co:
        """Block `index` with its weights filled; they stay until `done(index)`."""

    def done(self, index: int, output: mx.array) -> None:
        """Block `index` has built `output`, still lazy.

        Whoever takes the block's weights away has to evaluate `output` first.
        """


@dataclass(frozen=True)
class ResidentBlocks(Generic[Block]):
    """All blocks in memory."""

    blocks: Sequence[Block]

    def get(self, index: int) -> Block:
        return self.blocks[index]

    def done(self, index: int, output: mx.array) -> None:
        """Nothing to do: the block stays."""


class TokenMerging(Protocol):
    """Fewer tokens around attention: `merge` before, `unmerge` after, in every block.

    Called around self-attention (on the modulated input, before the gate) and around
    cross-attention (on the residual stream itself), in spatial and temporal blocks alike.
    """

    @property
    def stride(self) -> int:
        """Frames, counted from the first, that become one; those left at the end go with these."""

    def merge(self, x: mx.array) -> mx.array:
        """[B, T, S, C] to the tokens that attend, [B, T', S, C]."""

    def unmerge(self, x: mx.array, frames: int) -> mx.array:
        """Attention's result [B, T', S, C] back to `frames` frames, [B, T, S, C]."""


class NoMerging:
    """Every token attends."""

    stride = 1

    def merge(self, x: mx.array) -> mx.array:
        return x

    def unmerge(self, x: mx.array, frames: int) -> mx.array:
        return x


class ValueSharing(Protocol):
    """What attention within frames hands out for its values, block by block."""

    def values(self, v: mx.array, block: int) -> mx.array:
        """v [B · T, heads, S, head size] of spatial block `block`, or what stands for it."""


class BlockStackCache(Protocol):
    """What all blocks together add to the tokens, where something else knows it well enough.

    For one evaluation of the network: `instead` before the blocks; where it gives nothing, the
    blocks run, and `computed` is shown the outcome. Else no block is even asked for.
    """

    def cached_residual(self, x: mx.array, t: mx.array, x_mask: mx.array | None) -> mx.array | None:
        """What stands for the sum, [B, T, S, C], at tokens x [B, T, S, C] and flow times t [B].

        x_mask [B, T]: false for frames that are at t = 0. None has the blocks run.
        """

    def update(self, x: mx.array, out: mx.array) -> None:
        """The blocks have made `out` of x, still lazy."""


class Shard(Protocol):
    """What one process computes of an evaluation that several make together.

    b of the B samples; in spatial blocks all tokens of t of their T frames, in temporal blocks all
    frames at s of the S places of a frame. Every process calls all of this in the same order.
    """

    @property
    def batch_slice(self) -> slice:
        """The b samples."""

    def scatter(self, x: mx.array) -> mx.array:
        """Tokens of all, [B, T, S, C], to those of the first spatial block, [b, t, S, C]."""

    def scatter_frames(self, x: mx.array) -> mx.array:
        """Something per frame, [b, T, ...], to that of the t frames; [b, 1, ...] is for all."""

    def to_temporal(self, x: mx.array) -> mx.array:
        """From a spatial to a temporal block: [b, t, S, C] to [b, T, s, C]."""

    def to_spatial(self, x: mx.array) -> mx.array:
        """From a temporal to a spatial block: [b, T, s, C] to [b, t, S, C]."""

    def gather(self, x: mx.array) -> mx.array:
        """After the last block: [b, T, s, C] to what all have made, [B, T, S, C]."""


class Sharding(Protocol):
    """How several processes divide the evaluations of a network among them."""

    def shard(self, shape: Sequence[int], stride: int) -> Shard:
        """This process's part of tokens `shape`, (B, T, S); `stride` as in TokenPolicy."""


class Unsharded:
    """One process makes all of it; fills Layout and Share."""

    batch_slice = slice(None)

    def shard(self, shape: Sequence[int], stride: int) -> Unsharded:
        return self

    def scatter(self, x: mx.array) -> mx.array:
        return x

    def scatter_frames(self, x: mx.array) -> mx.array:
        return x

    def to_temporal(self, x: mx.array) -> mx.array:
        return x

    def to_spatial(self, x: mx.array) -> mx.array:
        return x

    def gather(self, x: mx.array) -> mx.array:
        return x


@dataclass(frozen=True)
class Hooks(Generic[Block]):
    """What one run puts into the seams. blocks: None means the network's own, resident.

    values: None leaves every attention its own; in a layout it sees the values of this process's
    share. stack: None always runs the blocks; it sees the tokens of all.
    """

    blocks: BlockProvider[Block] | None = None
    token_merging: TokenMerging = field(default_factory=NoMerging)
    value_sharing: ValueSharing | None = None
    block_cache: BlockStackCache | None = None
    sharding: Sharding = field(default_factory=Unsharded)
