"""What a plan is made of: sizes of a model, one run, a machine; and the plan itself. Bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mlx_sora.geometry import Geometry
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.t5 import T5Config
from mlx_sora.models.vae import VAEConfig

#: Bytes of a float32.
FLOAT = 4


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a network. blocks: each in memory; loading: the most that loading one takes; rest:
    all else in memory; stored: blocks, and all else, on disk; dense: the largest quantised layer
    once dequantised.
    """

    blocks: tuple[int, ...]
    loading: int
    rest: int
    stored_blocks: int
    stored_rest: int
    dense: int = 0

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.rest

    @property
    def stored(self) -> int:
        return self.stored_blocks + self.stored_rest


@dataclass(frozen=True)
class ModelSizes:
    """Configurations and sizes. temporal, spatial: of the decoders; vae_stored: both, on disk.

    encoders: temporal, spatial and both on disk, of the encoders; only where media are given.
    """

    text: T5Config
    transformer: STDiT3Config
    vae: VAEConfig
    text_weights: WeightSizes
    transformer_weights: WeightSizes
    temporal: int
    spatial: int
    vae_stored: int
    encoders: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class MediaWorkload:
    """Media to encode: chunks, frames of the longest, pixels of the largest source frame."""

    chunks: int
    longest: int
    pixels: int


@dataclass(frozen=True)
class StepVariant:
    """What an evaluation leaves out. merged: tokens of pairs of frames attend as one; alone: the
    half without prompt is not run; skipped: no block is.
    """

    tokens_merged: bool = False
    cond_only: bool = False
    blocks_skipped: bool = False


@dataclass(frozen=True)
class Workload:
    """One run. evaluations: velocities that are computed; spared: of them, those that leave
    something out, how many of each kind. streams: residual streams of all halves that are kept
    from one to the next.

    guided: with and without prompt, in one pass or (sequential) in two; halved: this process has
    one of the halves. inverts: as many before
    them, without guidance, that lead from a video to its noise; kept: bytes that these leave.
    clips: how often all this is done, each time but the first with `shared` frames taken over.
    tiles: in a row, that pictures are decoded in.
    """

    geometry: Geometry
    text_tokens: int
    evaluations: int
    variants: tuple[tuple[StepVariant, int], ...] = ()
    cached_residuals: float = 0
    guided: bool = True
    sequential: bool = False
    cfg_parallel: bool = False
    inverts: bool = False
    captured_bytes: int = 0
    media: MediaWorkload | None = None
    clips: int = 1
    shared_frames: int = 0
    vae_tiles: int = 1

    @property
    def batch(self) -> int:
        return 2 if self.guided and not (self.sequential or self.cfg_parallel) else 1

    @property
    def evaluations_by_variant(self) -> dict[StepVariant, int]:
        """Every evaluation, by kind."""
        rest = self.evaluations - sum(count for _, count in self.variants)
        return {StepVariant(): rest, **dict(self.variants)}

    @property
    def block_passes(self) -> int:
        """Passes through the blocks."""
        twice = self.guided and self.sequential
        each = {
            kind: count * (2 if twice and not kind.cond_only else 1)
            for kind, count in self.evaluations_by_variant.items()
            if not kind.blocks_skipped
        }
        return sum(each.values()) + self.inverts * self.evaluations


@dataclass(frozen=True)
class Machine:
    """gpu: where MLX computes; cache: the most it may keep of freed buffers without a budget;
    itemsize: bytes of a weight in memory.
    """

    gpu: bool
    cache: int
    itemsize: int = FLOAT


@dataclass(frozen=True)
class StagePlan:
    """One stage. peak: of the process; read, cache_limit and memory_limit (MLX's): bytes.

    throttled: MLX is held to the memory that one operation after the other needs. resident of
    `blocks` blocks stay; prefetch: others are loaded ahead; reserve: bytes that the first pass
    does not show (see `Residency`). micro_batch: frames per spatial pass; in_turn: the temporal
    decoder leaves memory before the spatial one comes.
    """

    stage: str
    peak: int
    read: int
    flops: int
    cache_limit: int
    memory_limit: int
    throttled: bool
    blocks: int = 0
    resident: int = 0
    prefetch: bool = False
    reserve: int = 0
    micro_batch: int | None = None
    in_turn: bool = False


@dataclass(frozen=True)
class Plan:
    """How a run will go. smallest: the budget below which it would be refused."""

    stages: tuple[StagePlan, ...]
    budget: int | None
    smallest: int

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    def stage(self, name: str) -> StagePlan:
        """The plan of stage `name`."""
        return next(stage for stage in self.stages if stage.stage == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"peak": self.peak}
