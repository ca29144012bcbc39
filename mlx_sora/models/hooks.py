"""Hooks that a network calls: one protocol each, with a default that changes nothing.

Networks know only these protocols. The modules that fill them depend on this one, never the
reverse. State belongs to the object that fills a hook, for one run.
Dimension letters: B batch, T frames, S tokens per frame, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import mlx.core as mx

Block = TypeVar("Block")
Block_co = TypeVar("Block_co", covariant=True)


class BlockProvider(Protocol[Block_co]):
    """Source of a network's blocks, in order, so that not all have to be in memory at once."""

    def get(self, index: int) -> Block_co:
        """Return block `index` with its weights, which stay until `release(index)`."""

    def release(self, index: int, output: mx.array) -> None:
        """Receive the output of block `index`, still lazy; this pass is done with the block.

        A provider that drops the weights must evaluate `output` first.
        """


@dataclass(frozen=True)
class ResidentBlocks(Generic[Block]):
    """Block provider with all blocks in memory."""

    blocks: Sequence[Block]

    def get(self, index: int) -> Block:
        return self.blocks[index]

    def release(self, index: int, output: mx.array) -> None:
        """Do nothing: the block stays."""


class SiteMerging(Protocol):
    """Reduction of tokens along time: `merge` before a part of a block, `unmerge` after it."""

    def merge(self, x: mx.array) -> mx.array:
        """Reduce tokens [B, T, S, C] to [B, T', S, C]."""

    def unmerge(self, x: mx.array, frames: int) -> mx.array:
        """Expand [B, T', S, C] to `frames` frames, [B, T, S, C]."""

    def positions(self, frames: int) -> mx.array | None:
        """Return the positions [T'] of the merged frames in time; None for 0 to T' - 1."""


class TokenMerging(Protocol):
    """Token merging of each site, a part of a block.

    Sites: spatial, temporal (self-attention, on the modulated input, before the gate), spatial-kv,
    temporal-kv (only its keys and values), cross (cross-attention of both kinds of block, on the
    residual stream itself), mlp (of both, on the modulated input).
    """

    @property
    def stride(self) -> int:
        """Number of successive frames that become one; a shorter rest at the end joins them."""

    def sites_of(self, block: int) -> tuple[str, ...]:
        """Return the sites of block `block` that merge, for estimates."""

    def at(self, block: int, site: str) -> SiteMerging:
        """Return the merging at one site of block `block`."""


class NoMerging:
    """Token merging that merges nothing, at every site."""

    stride = 1

    def sites_of(self, block: int) -> tuple[str, ...]:
        return ()

    def at(self, block: int, site: str) -> NoMerging:
        return self

    def merge(self, x: mx.array) -> mx.array:
        return x

    def unmerge(self, x: mx.array, frames: int) -> mx.array:
        return x

    def positions(self, frames: int) -> mx.array | None:
        return None


class ValueSharing(Protocol):
    """Replacement of the values in spatial attention, block by block."""

    def values(self, v: mx.array, block: int) -> mx.array:
        """Return v [B · T, heads, S, head size] of spatial block `block`, or its replacement."""


class BlockStackCache(Protocol):
    """Cache of the residual (out - in) of the whole block stack, for one forward pass.

    The network calls `cached_residual` before the blocks. If that returns None, the blocks run and
    `update` receives their output. Otherwise the network requests no block.
    """

    def cached_residual(self, x: mx.array, t: mx.array, x_mask: mx.array | None) -> mx.array | None:
        """Return the residual [B, T, S, C] for tokens x [B, T, S, C], or None to run the blocks.

        t [B]: flow times. x_mask [B, T]: false for frames that are at t = 0.
        """

    def update(self, x: mx.array, out: mx.array) -> None:
        """Receive the tokens before and after the blocks, still lazy."""


class Shard(Protocol):
    """One rank's shard of a forward pass.

    A rank has b of the B samples: all tokens of t of their T frames in spatial blocks, all frames
    of s of their S tokens per frame in temporal blocks. All ranks make the same calls in the same
    order.
    """

    @property
    def batch_slice(self) -> slice:
        """Slice of the b samples."""

    def scatter(self, x: mx.array) -> mx.array:
        """Return this rank's tokens [b, t, S, C] of all, [B, T, S, C], for the first block."""

    def scatter_frames(self, x: mx.array) -> mx.array:
        """Return the t frames of x [b, T, ...]; [b, 1, ...] holds for all frames."""

    def to_temporal(self, x: mx.array) -> mx.array:
        """Exchange tokens from spatial to temporal blocks: [b, t, S, C] to [b, T, s, C]."""

    def to_spatial(self, x: mx.array) -> mx.array:
        """Exchange tokens from temporal to spatial blocks: [b, T, s, C] to [b, t, S, C]."""

    def gather(self, x: mx.array) -> mx.array:
        """Return the tokens of all ranks, [B, T, S, C], after the last block."""


class Sharding(Protocol):
    """Division of forward passes among ranks."""

    def shard(self, shape: Sequence[int], stride: int) -> Shard:
        """Return this rank's shard of tokens of shape (B, T, S); stride: as in TokenMerging."""


class Unsharded:
    """Sharding and shard of a single process."""

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
    """Hooks of one forward pass.

    blocks: None for the network's own, resident ones. value_sharing: sees the values of this rank's
    shard. block_cache: sees the tokens of all ranks. on_block: called with the index of each block
    that has been computed; with it, blocks are evaluated one by one.
    """

    blocks: BlockProvider[Block] | None = None
    token_merging: TokenMerging = field(default_factory=NoMerging)
    value_sharing: ValueSharing | None = None
    block_cache: BlockStackCache | None = None
    sharding: Sharding = field(default_factory=Unsharded)
    on_block: Callable[[int], None] | None = None
