"""Peak memory of activations of each network, in bytes: shapes times measured factors.

A factor is the peak of MLX during one unit of work (a block pair, a frame, a chunk) over the size
of its main tensor, on CPU in float32 with mlx 0.32.4. GPU kernels run on larger pieces (the limits
in models/ops.py): for them sizes are added by arithmetic, unmeasured. Single arrays are bounded by
Metal, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_sora.geometry import Size
from mlx_sora.memory.flops import Grid
from mlx_sora.memory.plan import FLOAT32_SIZE
from mlx_sora.models.conv import MAX_WASTE
from mlx_sora.models.ops import LOGITS_BYTES, MIN_ROWS, MLP_BYTES, SLICE_BYTES
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.t5 import T5Config
from mlx_sora.models.vae import VAEConfig, chunk_plan
from mlx_sora.models.vae_tiling import tile_side

#: Scratch space of a Winograd convolution over its image, with MLX_CONV_WINOGRAD_TILE_BATCH=1: the
#: padded input, and input and output in tiles (mlx/backend/metal/conv.cpp).
WINOGRAD_SCRATCH = 1 + 2 * 64 / 36

#: Activations of a VAE's decoders and encoders in half precision over those in float32, throttled
#: and not. Means and variances are taken in float32 (forms for GPUs, with shifted convolutions;
#: measured 0.50 to 0.64, 0.64 to 0.75 and, in the spatial encoder, 0.93).
HALF_DECODER, HALF_ENCODER = (0.7, 0.8), (0.95, 0.8)

#: Buffers of a compiled chain of operations beside tensors of a VAE that are below SLICE_BYTES.
COMPILED_BUFFER = SLICE_BYTES // 2


@dataclass(frozen=True)
class ExecutionMode:
    """Conditions under which MLX computes.

    gpu: the forms of GPUs, whose kernels run on larger pieces.
    throttled: the scheduler may not allocate ahead (see `stage_limits`).
    itemsize: bytes per element of a matrix product's operands.
    """

    gpu: bool = False
    throttled: bool = False
    itemsize: int = FLOAT32_SIZE

    def pick(self, throttled: float, unthrottled: float) -> float:
        """Return the factor that applies."""
        return throttled if self.throttled else unthrottled


def vae_share(itemsize: int, mode: ExecutionMode, *, encoder: bool = False) -> float:
    """Return the activations of a VAE with `itemsize` bytes per value over those in float32."""
    if itemsize == FLOAT32_SIZE:
        return 1.0
    return mode.pick(*(HALF_ENCODER if encoder else HALF_DECODER))


def text_encoder(config: T5Config, tokens: int, mode: ExecutionMode) -> int:
    """Return the activations of one T5 block on a prompt, with the shared position bias."""
    bias = FLOAT32_SIZE * config.num_heads * tokens**2
    x, inner, wide = (
        FLOAT32_SIZE * tokens * n
        for n in (config.d_model, config.num_heads * config.d_kv, config.d_ff)
    )
    logits = 3 * bias if mode.gpu else min(3 * bias, 5 * SLICE_BYTES)
    peak = 2 * x + bias + max(5 * wide, logits + 4 * inner)
    return int(mode.pick(1, 2.3) * peak)


def transformer(config: STDiT3Config, grid: Grid, mode: ExecutionMode) -> int:
    """Return the activations of one STDiT3 block pair, its input included."""
    stream = FLOAT32_SIZE * grid.num_tokens * config.hidden_size
    factor = 1 + mode.pick(8.1, 17.5)
    if mode.gpu:
        hidden = int(grid.num_tokens * config.hidden_size * config.mlp_ratio) * mode.itemsize
        return int(factor * stream) + 5 * min(hidden, MLP_BYTES)
    row = FLOAT32_SIZE * int(config.hidden_size * config.mlp_ratio)
    hidden = min(grid.num_tokens * row, max(SLICE_BYTES, MIN_ROWS * row))
    keys = max(grid.spatial_tokens, grid.frames, grid.text_tokens)
    logits = FLOAT32_SIZE * grid.num_tokens * config.num_heads * keys
    # Without throttling, MLX runs into the following slices of queries.
    logits = min(logits, int(mode.pick(1, 2.5) * SLICE_BYTES))
    return int(factor * stream + mode.pick(4, 8) * max(hidden, logits))


def dequantization_buffers(largest: int, mode: ExecutionMode) -> int:
    """Return the bytes of layers dequantized at a time: two throttled, else four, on CPUs only.

    largest: bytes of the largest one, dequantized.
    """
    return 0 if mode.gpu else int(mode.pick(2, 4) * largest)


def text_keys_values(config: STDiT3Config, grid: Grid, mode: ExecutionMode) -> int:
    """Return the bytes of the text keys and values of all blocks, which stay for the run."""
    each = mode.itemsize * grid.batch * grid.text_tokens * config.hidden_size
    return 2 * 2 * config.depth * each


def residual_bytes(config: STDiT3Config, grid: Grid) -> int:
    """Return the bytes of the residual (out - in) of the block stack, in float32."""
    return FLOAT32_SIZE * grid.num_tokens * config.hidden_size


def window_latents(config: STDiT3Config, latent: Sequence[int]) -> int:
    """Return the bytes of all latents (T, H, W) of a video that is denoised in windows.

    In a step these are ten arrays: before and after it, velocities and their sum, and what
    samplers, leaps and the guidance cache keep. Those of one clip are nothing beside its tokens.
    """
    return 10 * FLOAT32_SIZE * math.prod(latent) * config.in_channels


def spatial_decoder(
    config: VAEConfig, size: Size, frames: int, mode: ExecutionMode, tiles: int = 1
) -> int:
    """Return the activations of the image decoder on frames of `size` pixels, in tiles x tiles."""
    widths, (width, height) = config.spatial.block_out_channels, size
    widest = max(widths[:2])  # the second width enters the last block upsampled
    kernel, factor = FLOAT32_SIZE * 9 * max(widths) ** 2, mode.pick(6, 12)
    if mode.gpu:
        factor = mode.pick(6 + WINOGRAD_SCRATCH / 2, 12)
    work = factor * FLOAT32_SIZE * frames * height * width * widest
    if tiles == 1:
        return int(work + mode.pick(0, COMPILED_BUFFER)) + 2 * kernel
    # The first level whole; then the tiles, beside its output and the frames so far.
    scale = config.spatial.factor // 2
    rows, columns = height // scale, width // scale
    first = FLOAT32_SIZE * frames * rows * columns * widths[-1]
    logits = FLOAT32_SIZE * frames * (rows * columns // 4) ** 2
    piece = LOGITS_BYTES if mode.gpu else SLICE_BYTES
    attention = min(mode.pick(3, 4.5) * logits, mode.pick(4, 20) * piece)
    share = tile_side(rows, tiles) * tile_side(columns, tiles) / (rows * columns)
    beside = first + 2 * FLOAT32_SIZE * frames * height * width * 3
    most = max(share * work, factor * first, attention + 2 * first)
    return int(most + mode.pick(0, COMPILED_BUFFER)) + beside + 4 * kernel


def temporal_decoder(
    config: VAEConfig, num_frames: int, height: int, width: int, mode: ExecutionMode
) -> int:
    """Return the activations of the temporal decoder on the largest chunk of a clip.

    height, width: of the latents.
    """
    temporal = config.temporal
    chunks = chunk_plan(num_frames, config.micro_frame_size, temporal.factor)
    latents = max(chunk.latents for chunk in chunks)
    tensor = _widest_tensor(config, latents * temporal.factor, height, width)
    kernel = FLOAT32_SIZE * 27 * 2 * max(temporal.widths) ** 2
    return _temporal_network(tensor, kernel, _uses_im2col(height, width), mode)


def spatial_encoder(
    config: VAEConfig, height: int, width: int, frames: int, mode: ExecutionMode
) -> int:
    """Return the activations of the image encoder on frames of `height` x `width` pixels."""
    widths = config.spatial.block_out_channels
    kernel = FLOAT32_SIZE * 9 * max(widths) ** 2
    return int(mode.pick(7, 15) * FLOAT32_SIZE * frames * height * width * widths[0]) + 2 * kernel


def temporal_encoder(
    config: VAEConfig, frames: int, height: int, width: int, mode: ExecutionMode
) -> int:
    """Return the activations of the temporal encoder on a chunk. height, width: of the latents."""
    temporal = config.temporal
    padded = temporal.latent_frames(frames) * temporal.factor
    tensor = _widest_tensor(config, padded, height, width)
    kernel = FLOAT32_SIZE * 27 * max(temporal.widths) ** 2
    return _temporal_network(tensor, kernel, _uses_im2col(height, width), mode)


def _temporal_network(tensor: int, kernel: int, im2col: bool, mode: ExecutionMode) -> int:
    """Return the activations of a network of the temporal VAE from its widest tensor."""
    if im2col:
        return 2 * kernel + int(mode.pick(37, 75) * tensor)
    return kernel + int(_temporal_factor(mode) * tensor + mode.pick(0, COMPILED_BUFFER))


def largest_transformer_array(config: STDiT3Config, grid: Grid, itemsize: int) -> int:
    """Return the bytes of the largest array of the transformer on a GPU: stream, or q, k and v."""
    return grid.num_tokens * config.hidden_size * max(FLOAT32_SIZE, 3 * itemsize)


def largest_spatial_array(width: int, size: Size, frames: int, tiles: int = 1) -> int:
    """Return the bytes of the largest array of the spatial VAE on a GPU.

    width: channels of the widest tensor at full size. size: of a frame. An image in Winograd tiles
    of 8 x 8 for 6 x 6 values is larger than it was.
    """
    share = 1.0
    if tiles > 1:
        share = tile_side(size.height, tiles) * tile_side(size.width, tiles)
        share /= size.height * size.width
    frame = FLOAT32_SIZE * size.height * size.width * width * share
    return int(max(frames, 64 / 36) * frame)


def largest_temporal_array(config: VAEConfig, frames: int, height: int, width: int) -> int:
    """Return the bytes of the largest array of the temporal VAE, with two padded frames.

    frames: of a chunk. height, width: of the latents.
    """
    return _widest_tensor(config, frames + 2, height, width)


def _temporal_factor(mode: ExecutionMode) -> float:
    """Return activations over the widest tensor. On GPUs Winograd's scratch space adds to them."""
    return mode.pick(10 if mode.gpu else 7, 13.5)


def _widest_tensor(config: VAEConfig, frames: int, height: int, width: int) -> int:
    """Return the bytes at the widest level of the temporal VAE that has all frames."""
    temporal = config.temporal
    level = next((i for i, t in enumerate(temporal.temporal_downsample) if t), 0)
    return FLOAT32_SIZE * frames * height * width * temporal.widths[level]


def _uses_im2col(height: int, width: int) -> bool:
    """Return True where small latents go to MLX's own convolution: 27 taps side by side."""
    return (height + 3) * (width + 1) > MAX_WASTE * height * width
