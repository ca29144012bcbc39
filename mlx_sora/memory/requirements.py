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
from mlx_sora.memory.limits import cache_limit, least_cache
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


@dataclass(frozen=True)
class BlockStageMemory:
    """Memory of a stage that runs a stack of blocks: text encoding or denoising.

    outside: memory outside MLX.
    fixed: MLX's, but for blocks, activations and cache.
    passes: passes through the blocks.
    reserve: part of the peak that the first pass does not show.
    largest_array: bytes of the largest activation.
    """

    stage: str
    outside: int
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
        least = self._used + least_cache(self.activations, gpu=self.mode.gpu)
        return least + self.weights.load_peak_bytes

    @property
    def comfortable(self) -> int:
        """Bytes from which the next block can be prefetched."""
        return self.minimum + max(self.weights.blocks)

    @property
    def _used(self) -> int:
        """Bytes without blocks and cache."""
        return self.outside + self.fixed + self.activations

    def plan_within(self, budget: int, machine: Machine, streamed: bool) -> StagePlan:
        """Plan the stage within `budget` bytes; blocks and cache share what is spare.

        streamed: no block is resident, even if it fits.
        """
        weights = self.weights
        available = budget - self._used
        spare = available - max(weights.blocks) - weights.load_peak_bytes
        cache = cache_limit(spare, self.activations, machine.cache_limit, gpu=self.mode.gpu)
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
        mlx = self.fixed + blocks + self.activations
        return StagePlan(
            stage=self.stage,
            peak=self.outside + mlx + cache,
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

    outside: memory outside MLX.
    spatial_activations: by frames per pass of the spatial VAE.
    queued_latents: latents of all chunks, which wait while the temporal decoder is offloaded.
    largest_array: bytes of the largest activation with one frame per pass.
    """

    stage: str
    outside: int
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
        frames = min(self.spatial_activations)
        least = least_cache(self._activations(frames), gpu=self.mode.gpu)
        return self.outside + least + self._offloaded(frames)

    @property
    def comfortable(self) -> int:
        """The minimum: more frames per pass are not faster."""
        return self.minimum

    def plan_within(self, budget: int, machine: Machine, streamed: bool) -> StagePlan:
        """Plan the stage within `budget` bytes, with as many frames per pass as fit.

        Of the two networks one is in memory at a time, streamed or not.
        """
        available = budget - self.outside
        frames = max(
            n
            for n in self.spatial_activations
            if n == 1
            or self._offloaded(n) + least_cache(self._activations(n), gpu=self.mode.gpu)
            <= available
        )
        used = self._offloaded(frames)
        cache = cache_limit(
            available - used, self._activations(frames), machine.cache_limit, gpu=self.mode.gpu
        )
        return self._plan(frames, used, cache, sequential_offload=True)

    def plan_unbounded(self, machine: Machine, streamed: bool) -> StagePlan:
        """Plan the stage without a budget; the networks are offloaded if `streamed`."""
        frames = max(self.spatial_activations)
        activations = self._activations(frames)
        used = self.weights.temporal + self.weights.spatial + activations
        if streamed:
            used = self._offloaded(frames)
        cache = min(machine.cache_limit, activations)
        return self._plan(frames, used, cache, sequential_offload=streamed)

    def _activations(self, frames: int) -> int:
        """Bytes of the activations of the larger network."""
        return max(self.temporal_activations, self.spatial_activations[frames])

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
            peak=self.outside + used + cache,
            read=self.weights.stored,
            flops=self.flops,
            cache_limit=cache,
            memory_limit=_memory_limit(used, activations, cache, self.mode),
            throttled=self.mode.throttled,
            micro_batch=frames,
            sequential_offload=sequential_offload,
        )


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
    read = []
    if workload.media is not None:
        read = [_media_encoder_memory(sizes, workload, workload.media, machine, mode)]
    decode = _decoder_memory(sizes, workload, machine, mode)
    if workload.vae_only:
        return (*read, decode)
    encode = _text_encoder_memory(sizes, workload, mode)
    if not workload.evaluations:  # a second pass that only enlarges
        return (encode, *read, decode)
    return (encode, *read, _denoising_memory(sizes, workload, mode), decode)


def _text_encoder_memory(
    sizes: ModelSizes, workload: Workload, mode: ExecutionMode
) -> BlockStageMemory:
    weights, tokens = sizes.text_weights, workload.text_tokens
    return BlockStageMemory(
        stage="encode",
        outside=workload.outside("encode", gpu=mode.gpu),
        fixed=weights.rest,
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
        outside=workload.outside("read", gpu=mode.gpu),
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
    texts = max(1, workload.window_texts)
    operations = flops.preparation_flops(config, cfg)
    operations += (workload.inversion + cond_only) * flops.preparation_flops(config, single)
    for variant, count in workload.evaluations_by_variant.items():
        one = _evaluation_flops(config, single if variant.cond_only else cfg, variant)
        if workload.inversion:  # which merges tokens in the same steps
            inverse = replace(variant, cond_only=False, blocks_skipped=False)
            one += _evaluation_flops(config, single, inverse)
        operations += count * one
    return BlockStageMemory(
        stage="denoise",
        outside=workload.outside("denoise", gpu=mode.gpu),
        fixed=weights.rest
        + texts * activations.text_keys_values(config, cfg, mode)
        + texts * cond_only * activations.text_keys_values(config, single, mode)
        + workload.captured_bytes
        + int(workload.cached_residuals * activations.residual_bytes(config, cfg))
        + workload.windowed * activations.window_latents(config, workload.all_latents),
        activations=activations.transformer(config, grid, mode)
        + activations.dequantization_buffers(weights.largest_dequantized, mode),
        weights=weights,
        passes=workload.block_passes * (workload.clips if workload.windowed else 1),
        mode=mode,
        reserve=_denoising_reserve(config, grid, workload, mode),
        flops=operations,
        largest_array=activations.largest_transformer_array(config, grid, mode.itemsize),
    )


def _evaluation_flops(config: STDiT3Config, grid: Grid, variant: StepVariant) -> int:
    if variant.blocks_skipped:
        config = replace(config, depth=0)
    return flops.transformer_flops(config, grid, variant.merged)


def _denoising_reserve(
    config: STDiT3Config, grid: Grid, workload: Workload, mode: ExecutionMode
) -> int:
    """Return the bytes that denoising allocates after its first pass."""
    cfg, single = replace(grid, batch=2 if workload.guided else 1), replace(grid, batch=1)
    if workload.inversion:  # its first pass is unguided and captures one evaluation at most
        wider = activations.transformer(config, grid, mode)
        wider -= activations.transformer(config, single, mode)
        return workload.captured_bytes + activations.text_keys_values(config, cfg, mode) + wider
    texts, own = max(1, workload.window_texts), activations.text_keys_values(config, single, mode)
    reserve = int(workload.cached_residuals * activations.residual_bytes(config, cfg))
    # The first pass is that of the first window, with its text.
    reserve += (texts - 1) * activations.text_keys_values(config, cfg, mode)
    # The unconditional pass has its own text keys and values, and so have cond-only steps.
    if workload.guided and workload.sequential_guidance:
        reserve += own
    if any(variant.cond_only for variant, _ in workload.variants):
        reserve += texts * own
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
    waiting = workload.num_frames if workload.windowed else frames
    share = activations.vae_share(workload.vae_itemsize, mode)
    return VaeStageMemory(
        stage="decode",
        outside=workload.outside("decode", gpu=mode.gpu),
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
        queued_latents=FLOAT32_SIZE * waiting * rows * columns * channels,
        largest_array=max(
            arrays(1), activations.largest_temporal_array(config, longest, rows, columns)
        ),
    )


def _micro_batches(config: VAEConfig, longest: int, fits: Callable[[int], bool]) -> Iterator[int]:
    """Yield the frames per pass to choose from: the config's, halved down to one, that fit."""
    most = min(config.micro_batch_size or longest, longest)
    for n in (most >> i for i in range(most.bit_length())):
        if n == 1 or fits(n):
            yield n
