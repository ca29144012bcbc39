"""Memory that each stage of a workload requires, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from mlx_sora.memory import activations, flops
from mlx_sora.memory.activations import ExecutionMode
from mlx_sora.memory.flops import Grid
from mlx_sora.memory.plan import (
    FLOAT32_SIZE,
    Machine,
    MediaWorkload,
    ModelSizes,
    StepVariant,
    Workload,
)
from mlx_sora.memory.stages import BlockStageMemory, StageMemory, VaeStageMemory
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.vae import VAEConfig, chunk_plan
from mlx_sora.models.vae_tiling import tiling_cost


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
        chunks=len(chunk_plan(waiting, config.micro_frame_size, config.temporal.factor)),
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
