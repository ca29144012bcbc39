"""What each stage needs, and the best plan for it within a budget. Bytes; peaks of the process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlx_sora.memory import flops
from mlx_sora.memory.activations import (
    ExecutionMode,
    dense_work,
    keys_values,
    spatial_encoder_work,
    spatial_work,
    temporal_encoder_work,
    temporal_work,
    text_encoder_work,
    transformer_work,
)
from mlx_sora.memory.flops import Grid
from mlx_sora.memory.plan import (
    FLOAT,
    Machine,
    MediaWorkload,
    ModelSizes,
    StagePlan,
    StepVariant,
    WeightSizes,
    Workload,
)
from mlx_sora.memory.residency import Blocks, Room, choose_resident
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.vae import VAEConfig, chunk_plan
from mlx_sora.models.vae_tiling import tiling_cost

#: Of the process, not MLX's: interpreter, libraries, what their allocators hold back.
OUTSIDE = 160 << 20

#: A video encoder's own memory: fixed, and per pixel of a frame (x264, measured).
ENCODER, ENCODER_PER_PIXEL = 64 << 20, 260

#: A video decoder's memory per pixel of a frame: some twenty frames of reference in yuv420p.
READER_PER_PIXEL = 36

#: The least that MLX may keep of freed buffers; below, every activation is a system call.
MIN_CACHE = 32 << 20


@dataclass(frozen=True)
class BlockStageMemory:
    """Encoding or denoising. fixed: all but blocks, activations and cache; reserve: of it, what is
    not there yet after the first pass.
    """

    stage: str
    fixed: int
    work: int
    weights: WeightSizes
    passes: int
    flops: int
    throttled: bool
    reserve: int = 0

    @property
    def least(self) -> int:
        return self.fixed + self.work + MIN_CACHE + self.weights.loading

    @property
    def comfortable(self) -> int:
        """With loading ahead."""
        return self.least + max(self.weights.blocks)

    def fit(self, budget: int, machine: Machine) -> StagePlan:
        """The plan within `budget`, of which what is left over goes to blocks and cache alike."""
        weights, size = self.weights, max(self.weights.blocks)
        room = budget - self.fixed - self.work
        cache = _cache(room - size - weights.loading, self.work, machine)
        kept = choose_resident(room - cache, Blocks(weights.blocks, weights.loading))
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
            memory_limit=mlx - (self.work // 2 if self.throttled else 0),
            throttled=self.throttled,
            blocks=count,
            resident=kept.resident,
            prefetch=kept.prefetch and kept.resident < count,
            reserve=self.reserve,
        )


@dataclass(frozen=True)
class VaeStageMemory:
    """Decoding, or encoding media (stage read). fixed: not MLX's; weights: of the temporal and the
    spatial half; temporal: activations of the one; spatial: of the other, by frames at a time;
    queue: all that the temporal decoder makes, kept where it leaves before the other comes.
    """

    fixed: int
    weights: tuple[int, int]
    temporal: int
    spatial: Mapping[int, int]
    read: int
    flops: int
    throttled: bool
    stage: str = "decode"
    queue: int = 0

    @property
    def least(self) -> int:
        return self.fixed + MIN_CACHE + self._in_turn(min(self.spatial))

    @property
    def comfortable(self) -> int:
        """As good as it gets: more frames at a time are no faster."""
        return self.least

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
        return self.queue + max(temporal + self.temporal, spatial + self.spatial[frames])

    def _plan(self, frames: int, held: int, cache: int, *, in_turn: bool) -> StagePlan:
        ahead = min(self.temporal, self.spatial[frames]) // 2 if self.throttled else 0
        return StagePlan(
            stage=self.stage,
            peak=self.fixed + held + cache,
            read=self.read,
            flops=self.flops,
            cache_limit=cache,
            memory_limit=held - ahead,
            throttled=self.throttled,
            micro_batch=frames,
            in_turn=in_turn,
        )


def _cache(spare: int, work: int, machine: Machine) -> int:
    """Share of the `spare` bytes for freed buffers: half, but no more than activations can use."""
    most = max(MIN_CACHE, min(machine.cache, work))
    return min(most, max(MIN_CACHE, spare // 2))


#: Of a stage.
StageMemory = BlockStageMemory | VaeStageMemory


def stage_requirements(
    model: ModelSizes, job: Workload, machine: Machine, *, throttled: bool
) -> tuple[StageMemory, ...]:
    """What encoding, reading media, denoising and decoding need, with MLX held back or not."""
    mode = ExecutionMode(machine.gpu, throttled, machine.itemsize)
    reading = () if job.media is None else (_reading(model, job, job.media, mode),)
    return (
        _encoding(model, job, mode),
        *reading,
        _denoising(model, job, mode),
        _decoding(model, job, mode),
    )


def _encoding(model: ModelSizes, job: Workload, mode: ExecutionMode) -> BlockStageMemory:
    return BlockStageMemory(
        stage="encode",
        fixed=OUTSIDE + model.text_weights.rest,
        work=text_encoder_work(model.text, job.text_tokens, mode)
        + dense_work(model.text_weights.dense, mode),
        weights=model.text_weights,
        passes=1,
        throttled=mode.throttled,
        flops=flops.text_encoder_flops(model.text, job.text_tokens),
    )


def _reading(
    model: ModelSizes, job: Workload, media: MediaWorkload, mode: ExecutionMode
) -> VaeStageMemory:
    """Reading and encoding media, the spatial encoder before the temporal one."""
    config, (width, height) = model.vae, job.geometry.size
    _, rows, columns = job.geometry.latent
    temporal, spatial, stored = model.encoders
    frames = 3 * media.longest * FLOAT * 3 * width * height
    return VaeStageMemory(
        stage="read",
        fixed=OUTSIDE + ENCODER + READER_PER_PIXEL * media.pixels,
        weights=(temporal, spatial),
        temporal=temporal_encoder_work(config, media.longest, rows, columns, mode),
        spatial={
            n: frames + spatial_encoder_work(config, height, width, n, mode)
            for n in _batches(config, media.longest)
        },
        read=stored,
        throttled=mode.throttled,
        flops=media.chunks
        * (
            flops.temporal_encoder_flops(config.temporal, media.longest, rows, columns)
            + media.longest * flops.spatial_encoder_flops(config.spatial, height, width)
        ),
    )


def _denoising(model: ModelSizes, job: Workload, mode: ExecutionMode) -> BlockStageMemory:
    config, guided = model.transformer, 2 if job.guided else 1
    grid = Grid.of(config, job.geometry.latent, job.batch, job.text_tokens)
    everyone = replace(grid, batch=guided)
    one, streams = (
        replace(grid, batch=1),
        int(job.cached_residuals * stream_bytes(config, everyone)),
    )
    alone = any(kind.cond_only for kind, _ in job.variants)
    operations = sum(
        count * _evaluation(config, one if kind.cond_only else everyone, kind)
        for kind, count in job.evaluations_by_variant.items()
    )
    if job.inverts:
        # The way back merges tokens in the same steps.
        operations += sum(
            count * _evaluation(config, one, StepVariant(tokens_merged=kind.tokens_merged))
            for kind, count in job.evaluations_by_variant.items()
        )
    return BlockStageMemory(
        stage="denoise",
        fixed=OUTSIDE
        + model.transformer_weights.rest
        + keys_values(config, everyone, mode)
        + alone * keys_values(config, one, mode)
        + job.captured_bytes
        + streams
        + (_writer(job) if job.clips > 1 else 0),
        work=transformer_work(config, grid, mode)
        + dense_work(model.transformer_weights.dense, mode),
        weights=model.transformer_weights,
        passes=job.block_passes,
        throttled=mode.throttled,
        reserve=_later(config, grid, job, mode),
        flops=operations
        + flops.preparation_flops(config, everyone)
        + (job.inverts + alone) * flops.preparation_flops(config, one),
    )


def _evaluation(config: STDiT3Config, grid: Grid, kind: StepVariant) -> int:
    """Operations of one evaluation."""
    if kind.blocks_skipped:
        config = replace(config, depth=0)
    return flops.transformer_flops(config, grid, merged=kind.tokens_merged)


def stream_bytes(config: STDiT3Config, grid: Grid) -> int:
    """The residual stream of all tokens."""
    return FLOAT * grid.size * config.hidden_size


def _later(config: STDiT3Config, grid: Grid, job: Workload, mode: ExecutionMode) -> int:
    """Bytes that denoising holds, but not after its first pass."""
    if job.inverts:  # that pass has no guidance and has kept the values of one evaluation at most
        first, last = replace(grid, batch=1), replace(grid, batch=2 if job.guided else 1)
        wider = transformer_work(config, grid, mode) - transformer_work(config, first, mode)
        return job.captured_bytes + keys_values(config, last, mode) + wider
    everyone, one = replace(grid, batch=2 if job.guided else 1), replace(grid, batch=1)
    streams = int(job.cached_residuals * stream_bytes(config, everyone))
    # The pass without prompt has keys and values of its own, and so has that with prompt alone.
    if job.guided and job.sequential:
        streams += keys_values(config, one, mode)
    if any(kind.cond_only for kind, _ in job.variants):
        streams += keys_values(config, one, mode)
    return streams


def _decoding(model: ModelSizes, job: Workload, mode: ExecutionMode) -> VaeStageMemory:
    config, (width, height) = model.vae, job.geometry.decoded
    _, rows, columns = job.geometry.latent
    chunks = chunk_plan(job.geometry.num_frames, config.micro_frame_size, config.temporal.factor)
    longest = max(chunk.frames for chunk in chunks)
    # A chunk's frames in float32: in batches, put together, and on their way to the file.
    frames = 3 * longest * FLOAT * 3 * width * height
    # As if the first level, which is a small part, were in tiles as well.
    each = tiling_cost(2 * rows, 2 * columns, job.vae_tiles)
    each *= flops.spatial_decoder_flops(config.spatial, rows, columns)
    operations = sum(
        flops.temporal_decoder_flops(config.temporal, chunk.latents, rows, columns)
        + int(chunk.frames * each)
        for chunk in chunks
    )
    return VaeStageMemory(
        fixed=OUTSIDE + _writer(job),
        weights=(model.temporal, model.spatial),
        temporal=temporal_work(config, job.geometry.num_frames, rows, columns, mode),
        spatial={
            n: frames + spatial_work(config, job.geometry.decoded, n, mode, job.vae_tiles)
            for n in _batches(config, longest)
        },
        read=model.vae_stored,
        throttled=mode.throttled,
        flops=operations,
        queue=FLOAT * job.geometry.num_frames * rows * columns * config.spatial.latent_channels,
    )


def _writer(job: Workload) -> int:
    """Bytes of the video encoder while a file is open."""
    width, height = job.geometry.decoded
    return ENCODER + ENCODER_PER_PIXEL * width * height


def _batches(config: VAEConfig, longest: int) -> set[int]:
    """Numbers of frames that the spatial VAE may take at a time: the config's, and halves of it."""
    most = min(config.micro_batch_size or longest, longest)
    return {most >> i for i in range(most.bit_length())}
