"""What a run will need, before anything is loaded, and how to fit it into a budget.

Pure functions of shapes, configurations and the sizes in checkpoint headers. Bytes throughout; the
peak of a stage is that of the whole process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_sora.errors import MemoryBudgetError
from mlx_sora.geometry import Geometry
from mlx_sora.models.stdit3_blocks import STDiT3Config
from mlx_sora.models.t5 import T5Config
from mlx_sora.models.vae import VAEConfig, chunk_plan
from mlx_sora.runtime import flops
from mlx_sora.runtime.activations import (
    FLOAT,
    Mode,
    keys_values,
    spatial_work,
    temporal_work,
    text_encoder_work,
    transformer_work,
)
from mlx_sora.runtime.flops import Grid
from mlx_sora.runtime.memory import memory_scope
from mlx_sora.runtime.profiles import show_bytes
from mlx_sora.runtime.residency import Blocks, Room, choose

#: Of the process, not MLX's: interpreter, libraries, what their allocators hold back.
OUTSIDE = 160 << 20

#: A video encoder's own memory: fixed, and per pixel of a frame (x264, measured).
ENCODER, ENCODER_PER_PIXEL = 64 << 20, 260

#: The least that MLX may keep of freed buffers; below, every activation is a system call.
MIN_CACHE = 32 << 20


@dataclass(frozen=True)
class Weights:
    """Bytes of a network. blocks: each in memory; loading: the most that loading one takes; rest:
    all else in memory; stored: blocks, and all else, on disk.
    """

    blocks: tuple[int, ...]
    loading: int
    rest: int
    stored_blocks: int
    stored_rest: int

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.rest

    @property
    def stored(self) -> int:
        return self.stored_blocks + self.stored_rest


@dataclass(frozen=True)
class Model:
    """Configurations and sizes. temporal, spatial: of the decoders; vae_stored: both, on disk."""

    text: T5Config
    transformer: STDiT3Config
    vae: VAEConfig
    text_weights: Weights
    transformer_weights: Weights
    temporal: int
    spatial: int
    vae_stored: int


@dataclass(frozen=True)
class Job:
    """One run. evaluations: velocities that are computed; merged: of them, with merged tokens.

    guided: with and without prompt, in one pass or (sequential) in two.
    """

    geometry: Geometry
    text_tokens: int
    evaluations: int
    merged: int = 0
    guided: bool = True
    sequential: bool = False

    @property
    def batch(self) -> int:
        return 2 if self.guided and not self.sequential else 1

    @property
    def passes(self) -> int:
        return self.evaluations * (2 if self.guided and self.sequential else 1)


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

    resident of `blocks` blocks stay; prefetch: others are loaded ahead; reserve: bytes that the
    first pass does not show (see `Residency`). micro_batch: frames per spatial pass; in_turn: the
    temporal decoder leaves memory before the spatial one comes.
    """

    stage: str
    peak: int
    read: int
    flops: int
    cache_limit: int
    memory_limit: int
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


def make_plan(
    model: Model,
    job: Job,
    machine: Machine,
    budget: int | None = None,
    *,
    streamed: bool = False,
) -> Plan:
    """The plan for `job`; with a `budget`, one whose every stage stays within it.

    Without one, all blocks are resident, or none if `streamed`. With one, blocks are streamed and
    as many stay as there is room for. Raises MemoryBudgetError naming the smallest that would do.
    """
    smallest = _smallest(model, job, machine)
    needs = _needs(model, job, machine, throttled=budget is not None)
    if budget is None:
        return Plan(tuple(need.unbounded(machine, streamed) for need in needs), None, smallest)
    for need in needs:
        if need.least > budget:
            raise _refusal(need, budget, model, job, machine)
    return Plan(tuple(need.fit(budget, machine) for need in needs), budget, smallest)


@contextmanager
def within(stage: StagePlan) -> Iterator[None]:
    """Run a stage under the limits of its plan.

    MLX's scheduler is held to the memory that the stage needs: left alone it allocates for
    operations far ahead of the one that runs, which nearly doubles the peak.
    """
    with memory_scope(stage.cache_limit):
        previous = mx.set_memory_limit(stage.memory_limit)
        try:
            yield
        finally:
            mx.set_memory_limit(previous)


@dataclass(frozen=True)
class _Blocks:
    """Encoding or denoising. fixed: all but blocks, activations and cache; reserve: of it, what is
    not there yet after the first pass.
    """

    stage: str
    fixed: int
    work: int
    weights: Weights
    passes: int
    flops: int
    reserve: int = 0

    @property
    def least(self) -> int:
        return self.fixed + self.work + MIN_CACHE + self.weights.loading

    def fit(self, budget: int, machine: Machine) -> StagePlan:
        """The plan within `budget`, of which what is left over goes to blocks and cache alike."""
        weights, size = self.weights, max(self.weights.blocks)
        room = budget - self.fixed - self.work
        cache = _cache(room - size - weights.loading, self.work, machine)
        kept = choose(room - cache, Blocks(weights.blocks, weights.loading))
        if self.passes == 1:  # what stays is never used again
            kept = replace(kept, resident=0)
        return self._plan(kept, cache)

    def unbounded(self, machine: Machine, streamed: bool) -> StagePlan:
        """The plan without a budget."""
        kept = 0 if streamed else len(self.weights.blocks)
        return self._plan(Room(kept, prefetch=streamed), min(machine.cache, self.work))

    def _plan(self, kept: Room, cache: int) -> StagePlan:
        weights, size, count = self.weights, max(self.weights.blocks), len(self.weights.blocks)
        held = kept.resident * size
        if kept.resident < count:
            held += weights.loading + (size if kept.prefetch else 0)
        again = weights.stored_blocks * (count - kept.resident) // count
        mlx = self.fixed - OUTSIDE + held + self.work
        return StagePlan(
            stage=self.stage,
            peak=OUTSIDE + mlx + cache,
            read=weights.stored + (self.passes - 1) * again,
            flops=self.flops,
            cache_limit=cache,
            memory_limit=mlx - self.work // 2,
            blocks=count,
            resident=kept.resident,
            prefetch=kept.prefetch and kept.resident < count,
            reserve=self.reserve,
        )


@dataclass(frozen=True)
class _Decoding:
    """Decoding. fixed: not MLX's; weights: of the temporal and the spatial decoder; temporal:
    activations of the one; spatial: of the other, by number of frames at a time.
    """

    fixed: int
    weights: tuple[int, int]
    temporal: int
    spatial: Mapping[int, int]
    read: int
    flops: int
    stage: str = "decode"

    @property
    def least(self) -> int:
        return self.fixed + MIN_CACHE + self._in_turn(min(self.spatial))

    def fit(self, budget: int, machine: Machine) -> StagePlan:
        """The plan within `budget`: as many frames at a time as there is room for."""
        room = budget - self.fixed
        frames = max(n for n in self.spatial if n == 1 or self._in_turn(n) + MIN_CACHE <= room)
        held, work = self._in_turn(frames), max(self.temporal, self.spatial[frames])
        return self._plan(frames, held, _cache(room - held, work, machine), in_turn=True)

    def unbounded(self, machine: Machine, streamed: bool) -> StagePlan:
        """The plan without a budget."""
        frames = max(self.spatial)
        work = max(self.temporal, self.spatial[frames])
        held = self._in_turn(frames) if streamed else sum(self.weights) + work
        return self._plan(frames, held, min(machine.cache, work), in_turn=streamed)

    def _in_turn(self, frames: int) -> int:
        temporal, spatial = self.weights
        return max(temporal + self.temporal, spatial + self.spatial[frames])

    def _plan(self, frames: int, held: int, cache: int, *, in_turn: bool) -> StagePlan:
        return StagePlan(
            stage=self.stage,
            peak=self.fixed + held + cache,
            read=self.read,
            flops=self.flops,
            cache_limit=cache,
            memory_limit=held - min(self.temporal, self.spatial[frames]) // 2,
            micro_batch=frames,
            in_turn=in_turn,
        )


def _cache(spare: int, work: int, machine: Machine) -> int:
    """Share of the `spare` bytes for freed buffers: half, but no more than activations can use."""
    most = max(MIN_CACHE, min(machine.cache, work))
    return min(most, max(MIN_CACHE, spare // 2))


def _needs(
    model: Model, job: Job, machine: Machine, *, throttled: bool
) -> tuple[_Blocks, _Blocks, _Decoding]:
    mode = Mode(machine.gpu, throttled, machine.itemsize)
    return _encoding(model, job, mode), _denoising(model, job, mode), _decoding(model, job, mode)


def _encoding(model: Model, job: Job, mode: Mode) -> _Blocks:
    return _Blocks(
        stage="encode",
        fixed=OUTSIDE + model.text_weights.rest,
        work=text_encoder_work(model.text, job.text_tokens, mode),
        weights=model.text_weights,
        passes=1,
        flops=flops.text_encoder_flops(model.text, job.text_tokens),
    )


def _denoising(model: Model, job: Job, mode: Mode) -> _Blocks:
    config, guided = model.transformer, 2 if job.guided else 1
    grid = Grid.of(config, job.geometry.latent, job.batch, job.text_tokens)
    everyone = replace(grid, batch=guided)
    plain, merged = (flops.transformer_flops(config, everyone, merged=m) for m in (False, True))
    return _Blocks(
        stage="denoise",
        fixed=OUTSIDE + model.transformer_weights.rest + keys_values(config, everyone, mode),
        work=transformer_work(config, grid, mode),
        weights=model.transformer_weights,
        passes=job.passes,
        # The pass without prompt has keys and values of its own.
        reserve=keys_values(config, grid, mode) if job.guided and job.sequential else 0,
        flops=flops.preparation_flops(config, everyone)
        + (job.evaluations - job.merged) * plain
        + job.merged * merged,
    )


def _decoding(model: Model, job: Job, mode: Mode) -> _Decoding:
    config, (width, height) = model.vae, job.geometry.decoded
    _, rows, columns = job.geometry.latent
    chunks = chunk_plan(job.geometry.num_frames, config.micro_frame_size, config.temporal.factor)
    longest = max(chunk.frames for chunk in chunks)
    # A chunk's frames in float32: in batches, put together, and on their way to the file.
    frames = 3 * longest * FLOAT * 3 * width * height
    most = min(config.micro_batch_size or longest, longest)
    sizes = {most >> i for i in range(most.bit_length())}
    operations = sum(
        flops.temporal_decoder_flops(config.temporal, chunk.latents, rows, columns)
        + chunk.frames * flops.spatial_decoder_flops(config.spatial, rows, columns)
        for chunk in chunks
    )
    return _Decoding(
        fixed=OUTSIDE + ENCODER + ENCODER_PER_PIXEL * width * height,
        weights=(model.temporal, model.spatial),
        temporal=temporal_work(config, job.geometry.num_frames, rows, columns, mode),
        spatial={n: frames + spatial_work(config, height, width, n, mode) for n in sizes},
        read=model.vae_stored,
        flops=operations,
    )


def _refusal(
    need: _Blocks | _Decoding, budget: int, model: Model, job: Job, machine: Machine
) -> MemoryBudgetError:
    """Says which stage does not fit, and what would: another budget, or guidance in two passes."""
    smallest = _smallest(model, job, machine)
    other = _smallest(model, replace(job, sequential=True), machine)
    fix = f"Use --memory-budget {_option(smallest)} or more"
    if other <= budget:
        fix += ", or --sequential-guidance"
    elif other < smallest:
        fix += f" ({_option(other)} with --sequential-guidance)"
    return MemoryBudgetError(
        f"Stage {need.stage} needs {show_bytes(need.least)}, the budget is {show_bytes(budget)}.",
        f"{fix}, or make a smaller video.",
    )


def _smallest(model: Model, job: Job, machine: Machine) -> int:
    return max(need.least for need in _needs(model, job, machine, throttled=True))


def _option(count: int) -> str:
    """Bytes as --memory-budget takes them."""
    return show_bytes(count).replace(" ", "")
