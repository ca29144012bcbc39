"""Memory that each stage requires, and the best plan for it within a budget.

All sizes are in bytes; peaks are those of the whole process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from mlx_sora.memory import activations, flops
from mlx_sora.memory.activations import ExecutionMode
from mlx_sora.memory.flops import Grid
from mlx_sora.memory.plan import (
    FLOAT32_SIZE,
    Machine,
    MediaWorkload,
    ModelSizes,
    StagePlan,
    StepVariant,
    VAESizes,
    WeightSizes,
    Workload,
)
from mlx_sora.memory.residency import ResidencyPlan, choose_resident
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.vae import VAEConfig, chunk_plan
from mlx_sora.models.vae_tiling import tiling_cost

#: Memory of the process outside MLX: interpreter, libraries, what their allocators hold back.
NON_MLX_BYTES = 160 << 20

#: A video encoder's own memory: fixed, and per pixel of a frame (x264, measured).
VIDEO_ENCODER_BYTES, VIDEO_ENCODER_BYTES_PER_PIXEL = 64 << 20, 260

#: A video decoder's memory per pixel of a frame: some twenty reference frames (measured in 4K: 39
#: of H.264, 56 of 10-bit HEVC).
VIDEO_DECODER_BYTES_PER_PIXEL = 60

#: The smallest limit of MLX's cache. Below it, every activation is a system call.
MIN_CACHE = 32 << 20


@dataclass(frozen=True)
class BlockStageMemory:
    """Memory of a stage that runs a stack of blocks: text encoding or denoising.

    fixed: everything but blocks, activations and cache.
    passes: passes through the blocks.
    reserve: part of the peak that the first pass does not show.
    largest_array: bytes of the largest activation.
    """

    stage: str
    fixed: int
    activations: int
    weights: WeightSizes
    passes: int
    flops: int
    mode: ExecutionMode
    reserve: int = 0
    largest_array: int = 0

    @property
    def minimum(self) -> int:
        """Bytes with one block in memory at a time."""
        return self.fixed + self.activations + MIN_CACHE + self.weights.load_peak_bytes

    @property
    def comfortable(self) -> int:
        """Bytes from which the next block can be prefetched."""
        return self.minimum + max(self.weights.blocks)

    def plan_within(self, budget: int, machine: Machine, streamed: bool) -> StagePlan:
        """Plan the stage within `budget` bytes; blocks and cache share what is spare.

        streamed: no block is resident, even if it fits.
        """
        weights = self.weights
        available = budget - self.fixed - self.activations
        spare = available - max(weights.blocks) - weights.load_peak_bytes
        cache = _cache_limit(spare, self.activations, machine)
        residency = choose_resident(available - cache, weights.blocks, weights.load_peak_bytes)
        if streamed or self.passes == 1:  # of one pass, no block would be used again
            residency = replace(residency, resident=0)
        return self._plan(residency, cache)

    def plan_unbounded(self, machine: Machine, streamed: bool) -> StagePlan:
        """Plan the stage without a budget."""
        resident = 0 if streamed else len(self.weights.blocks)
        cache = min(machine.cache_limit, self.activations)
        return self._plan(ResidencyPlan(resident, prefetch=streamed), cache)

    def _plan(self, residency: ResidencyPlan, cache: int) -> StagePlan:
        weights, size, count = self.weights, max(self.weights.blocks), len(self.weights.blocks)
        blocks = residency.resident * size
        if residency.resident < count:
            blocks += weights.load_peak_bytes + (size if residency.prefetch else 0)
        streamed_again = weights.stored_blocks * (count - residency.resident) // count
        mlx = self.fixed - NON_MLX_BYTES + blocks + self.activations
        return StagePlan(
            stage=self.stage,
            peak=NON_MLX_BYTES + mlx + cache,
            read=weights.stored + (self.passes - 1) * streamed_again,
            flops=self.flops,
            cache_limit=cache,
            memory_limit=_memory_limit(mlx, self.activations, cache, self.mode),
            throttled=self.mode.throttled,
            blocks=count,
            resident=residency.resident,
            prefetch=residency.prefetch and residency.resident < count,
            reserve=self.reserve,
        )


@dataclass(frozen=True)
class VaeStageMemory:
    """Memory of decoding, or of encoding media (stage read).

    fixed: memory outside MLX.
    spatial_activations: by frames per pass of the spatial VAE.
    queued_latents: latents of all chunks, which wait while the temporal decoder is offloaded.
    largest_array: bytes of the largest activation with one frame per pass.
    """

    stage: str
    fixed: int
    weights: VAESizes
    temporal_activations: int
    spatial_activations: Mapping[int, int]
    flops: int
    mode: ExecutionMode
    queued_latents: int = 0
    largest_array: int = 0

    @property
    def minimum(self) -> int:
        """Bytes with one frame per pass."""
        return self.fixed + MIN_CACHE + self._offloaded(min(self.spatial_activations))

    @property
    def comfortable(self) -> int:
        """The minimum: more frames per pass are not faster."""
        return self.minimum

    def plan_within(self, budget: int, machine: Machine, streamed: bool) -> StagePlan:
        """Plan the stage within `budget` bytes, with as many frames per pass as fit.

        Of the two networks one is in memory at a time, streamed or not.
        """
        available = budget - self.fixed
        frames = max(
            n
            for n in self.spatial_activations
            if n == 1 or self._offloaded(n) + MIN_CACHE <= available
        )
        used = self._offloaded(frames)
        activations = max(self.temporal_activations, self.spatial_activations[frames])
        cache = _cache_limit(available - used, activations, machine)
        return self._plan(frames, used, cache, sequential_offload=True)

    def plan_unbounded(self, machine: Machine, streamed: bool) -> StagePlan:
        """Plan the stage without a budget; the networks are offloaded if `streamed`."""
        frames = max(self.spatial_activations)
        activations = max(self.temporal_activations, self.spatial_activations[frames])
        used = self.weights.temporal + self.weights.spatial + activations
        if streamed:
            used = self._offloaded(frames)
        cache = min(machine.cache_limit, activations)
        return self._plan(frames, used, cache, sequential_offload=streamed)

    def _offloaded(self, frames: int) -> int:
        """Bytes of MLX with one of the two networks in memory at a time."""
        return self.queued_latents + max(
            self.weights.temporal + self.temporal_activations,
            self.weights.spatial + self.spatial_activations[frames],
        )

    def _plan(self, frames: int, used: int, cache: int, *, sequential_offload: bool) -> StagePlan:
        activations = min(self.temporal_activations, self.spatial_activations[frames])
        return StagePlan(
            stage=self.stage,
            peak=self.fixed + used + cache,
            read=self.weights.stored,
            flops=self.flops,
            cache_limit=cache,
            memory_limit=_memory_limit(used, activations, cache, self.mode),
            throttled=self.mode.throttled,
            micro_batch=frames,
            sequential_offload=sequential_offload,
        )


def _cache_limit(spare: int, activations: int, machine: Machine) -> int:
    """Return half of the spare bytes, but no more than activations can use."""
    most = max(MIN_CACHE, min(machine.cache_limit, activations))
    return min(most, max(MIN_CACHE, spare // 2))


def _memory_limit(used: int, activations: int, cache: int, mode: ExecutionMode) -> int:
    """Return MLX's memory limit: what is used, less if the scheduler is to wait for memory.

    On GPUs it counts the cache, too: above it Metal frees cached buffers before it makes new ones.
    """
    limit = used - (activations // 2 if mode.throttled else 0)
    return limit + (cache if mode.gpu else 0)


StageMemory = BlockStageMemory | VaeStageMemory


def stage_requirements(
    sizes: ModelSizes, workload: Workload, machine: Machine, *, throttled: bool
) -> tuple[StageMemory, ...]:
    """Return the memory of every stage in order, with MLX's scheduler throttled or not."""
    mode = ExecutionMode(machine.gpu, throttled and machine.can_throttle, machine.itemsize)
    stages: list[StageMemory] = [_text_encoder_memory(sizes, workload.text_tokens, mode)]
    if workload.media is not None:
        stages.append(_media_encoder_memory(sizes, workload, workload.media, machine, mode))
    stages.append(_denoising_memory(sizes, workload, mode))
    stages.append(_decoder_memory(sizes, workload, machine, mode))
    return tuple(stages)


def _text_encoder_memory(sizes: ModelSizes, tokens: int, mode: ExecutionMode) -> BlockStageMemory:
    weights = sizes.text_weights
    return BlockStageMemory(
        stage="encode",
        fixed=NON_MLX_BYTES + weights.rest,
        activations=activations.text_encoder(sizes.text, tokens, mode)
        + activations.dequantization_buffers(weights.largest_dequantized, mode),
        weights=weights,
        passes=1,
        mode=mode,
        flops=flops.text_encoder_flops(sizes.text, tokens),
    )


def _media_encoder_memory(
    sizes: ModelSizes,
    workload: Workload,
    media: MediaWorkload,
    machine: Machine,
    mode: ExecutionMode,
) -> VaeStageMemory:
    config, (width, height) = sizes.vae, workload.geometry.size
    channels = config.spatial.block_out_channels[0]
    arrays = partial(activations.largest_spatial_array, channels, workload.geometry.size)
    _, rows, columns = workload.geometry.latent
    frames = media.chunk_frames
    pixels = 3 * frames * FLOAT32_SIZE * 3 * width * height
    share = activations.vae_share(workload.vae_itemsize, mode, encoder=True)
    chunk_flops = flops.temporal_encoder_flops(config.temporal, frames, rows, columns)
    chunk_flops += frames * flops.spatial_encoder_flops(config.spatial, height, width)
    return VaeStageMemory(
        stage="read",
        fixed=NON_MLX_BYTES
        + VIDEO_ENCODER_BYTES
        + VIDEO_DECODER_BYTES_PER_PIXEL * media.source_pixels,
        weights=sizes.vae_encoder.with_itemsize(workload.vae_itemsize),
        temporal_activations=int(
            share * activations.temporal_encoder(config, frames, rows, columns, mode)
        ),
        spatial_activations={
            n: pixels + int(share * activations.spatial_encoder(config, height, width, n, mode))
            for n in _micro_batches(config, frames, lambda n: machine.can_allocate(arrays(n)))
        },
        mode=mode,
        flops=media.chunks * chunk_flops,
        largest_array=max(
            arrays(1), activations.largest_temporal_array(config, frames, rows, columns)
        ),
    )


def _denoising_memory(
    sizes: ModelSizes, workload: Workload, mode: ExecutionMode
) -> BlockStageMemory:
    config, weights = sizes.transformer, sizes.transformer_weights
    latent = workload.geometry.latent
    grid = Grid.from_latent(config, latent, workload.batch, workload.text_tokens)
    cfg, single = replace(grid, batch=2 if workload.guided else 1), replace(grid, batch=1)
    cond_only = any(variant.cond_only for variant, _ in workload.variants)
    operations = flops.preparation_flops(config, cfg)
    operations += (workload.inversion + cond_only) * flops.preparation_flops(config, single)
    for variant, count in workload.evaluations_by_variant.items():
        one = _evaluation_flops(config, single if variant.cond_only else cfg, variant)
        if workload.inversion:  # which merges tokens in the same steps
            inverse = StepVariant(tokens_merged=variant.tokens_merged)
            one += _evaluation_flops(config, single, inverse)
        operations += count * one
    return BlockStageMemory(
        stage="denoise",
        fixed=NON_MLX_BYTES
        + weights.rest
        + activations.text_keys_values(config, cfg, mode)
        + cond_only * activations.text_keys_values(config, single, mode)
        + workload.captured_bytes
        + int(workload.cached_residuals * residual_bytes(config, cfg))
        + (_video_encoder_bytes(workload) if workload.clips > 1 else 0),
        activations=activations.transformer(config, grid, mode)
        + activations.dequantization_buffers(weights.largest_dequantized, mode),
        weights=weights,
        passes=workload.block_passes,
        mode=mode,
        reserve=_denoising_reserve(config, grid, workload, mode),
        flops=operations,
        largest_array=activations.largest_transformer_array(config, grid, mode.itemsize),
    )


def _evaluation_flops(config: STDiT3Config, grid: Grid, variant: StepVariant) -> int:
    if variant.blocks_skipped:
        config = replace(config, depth=0)
    return flops.transformer_flops(config, grid, merged=variant.tokens_merged)


def residual_bytes(config: STDiT3Config, grid: Grid) -> int:
    """Return the bytes of the residual (out - in) of the block stack, in float32."""
    return FLOAT32_SIZE * grid.num_tokens * config.hidden_size


def _denoising_reserve(
    config: STDiT3Config, grid: Grid, workload: Workload, mode: ExecutionMode
) -> int:
    """Return the bytes that denoising allocates after its first pass."""
    cfg, single = replace(grid, batch=2 if workload.guided else 1), replace(grid, batch=1)
    if workload.inversion:  # its first pass is unguided and captures one evaluation at most
        wider = activations.transformer(config, grid, mode)
        wider -= activations.transformer(config, single, mode)
        return workload.captured_bytes + activations.text_keys_values(config, cfg, mode) + wider
    reserve = int(workload.cached_residuals * residual_bytes(config, cfg))
    # The unconditional pass has its own text keys and values, and so have cond-only steps.
    if workload.guided and workload.sequential_guidance:
        reserve += activations.text_keys_values(config, single, mode)
    if any(variant.cond_only for variant, _ in workload.variants):
        reserve += activations.text_keys_values(config, single, mode)
    return reserve


def _decoder_memory(
    sizes: ModelSizes, workload: Workload, machine: Machine, mode: ExecutionMode
) -> VaeStageMemory:
    config, geometry, tiles = sizes.vae, workload.geometry, workload.vae_tiles
    widest = max(config.spatial.block_out_channels[:2])
    arrays = partial(activations.largest_spatial_array, widest, geometry.decoded, tiles=tiles)
    width, height = geometry.decoded
    _, rows, columns = geometry.latent
    chunks = chunk_plan(geometry.num_frames, config.micro_frame_size, config.temporal.factor)
    longest = max(chunk.frames for chunk in chunks)
    # A chunk's frames in float32: in batches, concatenated, and on their way to the file.
    pixels = 3 * longest * FLOAT32_SIZE * 3 * width * height
    # As if the first level, which is a small part, were tiled as well.
    frame_flops = tiling_cost(2 * rows, 2 * columns, tiles)
    frame_flops *= flops.spatial_decoder_flops(config.spatial, rows, columns)
    operations = sum(
        flops.temporal_decoder_flops(config.temporal, chunk.latents, rows, columns)
        + int(chunk.frames * frame_flops)
        for chunk in chunks
    )
    frames, channels = geometry.num_frames, config.spatial.latent_channels
    share = activations.vae_share(workload.vae_itemsize, mode)
    return VaeStageMemory(
        stage="decode",
        fixed=NON_MLX_BYTES + _video_encoder_bytes(workload),
        weights=sizes.vae_decoder.with_itemsize(workload.vae_itemsize),
        temporal_activations=int(
            share * activations.temporal_decoder(config, frames, rows, columns, mode)
        ),
        spatial_activations={
            n: pixels
            + int(share * activations.spatial_decoder(config, geometry.decoded, n, mode, tiles))
            for n in _micro_batches(config, longest, lambda n: machine.can_allocate(arrays(n)))
        },
        mode=mode,
        flops=operations,
        queued_latents=FLOAT32_SIZE * frames * rows * columns * channels,
        largest_array=max(
            arrays(1), activations.largest_temporal_array(config, longest, rows, columns)
        ),
    )


def _video_encoder_bytes(workload: Workload) -> int:
    width, height = workload.geometry.decoded
    return VIDEO_ENCODER_BYTES + VIDEO_ENCODER_BYTES_PER_PIXEL * width * height


def _micro_batches(config: VAEConfig, longest: int, fits: Callable[[int], bool]) -> Iterator[int]:
    """Yield the frames per pass to choose from: the config's, halved down to one, that fit."""
    most = min(config.micro_batch_size or longest, longest)
    for n in (most >> i for i in range(most.bit_length())):
        if n == 1 or fits(n):
            yield n
