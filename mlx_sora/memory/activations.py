"""Peak memory of activations, by stage: shapes times factors that were measured.

The factors are MLX's peak during one unit of work, over the size of its main tensor, on CPU in
float32 with mlx 0.32.4 (benchmarks of one block, one frame, one chunk); for GPUs, whose kernels run
on whole tensors at once, the pieces' sizes are added by arithmetic and unmeasured.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_sora.geometry import Size
from mlx_sora.memory.flops import Grid
from mlx_sora.memory.plan import FLOAT
from mlx_sora.models.ops import MIN_ROWS, SLICE_BYTES
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.t5 import T5Config
from mlx_sora.models.vae import VAEConfig, chunk_plan
from mlx_sora.models.vae_tiling import tile_side

#: What a compiled chain holds besides a VAE's tensors, while those are too small to be cut.
CHAIN = SLICE_BYTES // 2


@dataclass(frozen=True)
class ExecutionMode:
    """How MLX runs. gpu: on whole tensors; throttled: as `planner.within` has it, with no effect
    on GPUs; itemsize: bytes of a matrix product's operands.
    """

    gpu: bool = False
    throttled: bool = False
    itemsize: int = FLOAT

    def pick(self, throttled: float, free: float) -> float:
        """The factor that applies."""
        return throttled if self.throttled and not self.gpu else free


def text_encoder_work(config: T5Config, tokens: int, mode: ExecutionMode) -> int:
    """T5 on one prompt of `tokens` tokens: one block, and the position bias that all share."""
    bias = FLOAT * config.num_heads * tokens**2
    x, inner, wide = (
        FLOAT * tokens * n for n in (config.d_model, config.num_heads * config.d_kv, config.d_ff)
    )
    logits = 3 * bias if mode.gpu else min(3 * bias, 5 * SLICE_BYTES)
    peak = 2 * x + bias + max(5 * wide, logits + 4 * inner)
    return int(mode.pick(1, 2.3) * peak)


def transformer_work(config: STDiT3Config, grid: Grid, mode: ExecutionMode) -> int:
    """One pair of STDiT3 blocks, its input included."""
    stream = FLOAT * grid.size * config.hidden_size
    factor = 1 + mode.pick(8.1, 17.5)
    if mode.gpu:
        factor += 5 * config.mlp_ratio * mode.itemsize / FLOAT
    piece = max(SLICE_BYTES, FLOAT * MIN_ROWS * int(config.hidden_size * config.mlp_ratio))
    return int(factor * stream + mode.pick(4, 8) * piece)


def dense_work(largest: int, mode: ExecutionMode) -> int:
    """Layers that are dequantised for their use: two at a time, free ones four."""
    return 0 if mode.gpu else int(mode.pick(2, 4) * largest)


def keys_values(config: STDiT3Config, grid: Grid, mode: ExecutionMode) -> int:
    """Text keys and values of all blocks, which stay for the run."""
    each = mode.itemsize * grid.batch * grid.text * config.hidden_size
    return 2 * 2 * config.depth * each


def spatial_work(
    config: VAEConfig, size: Size, frames: int, mode: ExecutionMode, tiles: int = 1
) -> int:
    """The image decoder on `frames` frames of `size` pixels at once, in `tiles` x `tiles` tiles."""
    widths, (width, height) = config.spatial.block_out_channels, size
    widest = max(widths[:2])  # the second width comes enlarged into the last block
    kernel, factor = FLOAT * 9 * max(widths) ** 2, mode.pick(6, 12)
    work = factor * FLOAT * frames * height * width * widest
    if tiles == 1:
        return int(work + mode.pick(0, CHAIN)) + 2 * kernel
    # The first level whole; then tiles, beside its result and the frames so far.
    scale = config.spatial.factor // 2
    rows, columns = height // scale, width // scale
    first = FLOAT * frames * rows * columns * widths[-1]
    logits = FLOAT * frames * (rows * columns // 4) ** 2
    attention = min(mode.pick(3, 4.5) * logits, mode.pick(4, 20) * SLICE_BYTES)
    share = tile_side(rows, tiles) * tile_side(columns, tiles) / (rows * columns)
    beside = first + 2 * FLOAT * frames * height * width * 3
    most = max(share * work, factor * first, attention + 2 * first)
    return int(most + mode.pick(0, CHAIN)) + beside + 4 * kernel


def temporal_work(
    config: VAEConfig, num_frames: int, height: int, width: int, mode: ExecutionMode
) -> int:
    """The temporal decoder on the largest chunk of a clip, latents `height` x `width`."""
    temporal = config.temporal
    chunks = chunk_plan(num_frames, config.micro_frame_size, temporal.factor)
    latents = max(chunk.latents for chunk in chunks)
    # Widest level that has all frames: the first below which time is not doubled any more.
    level = next((i for i, t in enumerate(temporal.temporal_downsample) if t), 0)
    widest = temporal.widths[level]
    tensor = FLOAT * latents * temporal.factor * height * width * widest
    small = (height + 3) * (width + 1) > 1.25 * height * width
    kernel = FLOAT * 27 * 2 * max(temporal.widths) ** 2
    if small:  # MLX's own convolution, 27 taps side by side
        return 2 * kernel + 37 * tensor + int(mode.pick(0, CHAIN))
    return int(mode.pick(7, 13.5) * tensor + mode.pick(0, CHAIN)) + kernel


def spatial_encoder_work(
    config: VAEConfig, height: int, width: int, frames: int, mode: ExecutionMode
) -> int:
    """The image encoder on `frames` frames of `height` x `width` pixels at once."""
    widths = config.spatial.block_out_channels
    kernel = FLOAT * 9 * max(widths) ** 2
    return int(mode.pick(7, 15) * FLOAT * frames * height * width * widths[0]) + 2 * kernel


def temporal_encoder_work(
    config: VAEConfig, frames: int, height: int, width: int, mode: ExecutionMode
) -> int:
    """The temporal encoder on a chunk of `frames` frames, latents `height` x `width`."""
    temporal = config.temporal
    # Widest level that still has all frames.
    level = next((i for i, t in enumerate(temporal.temporal_downsample) if t), 0)
    padded = temporal.latent_frames(frames) * temporal.factor
    tensor = FLOAT * padded * height * width * temporal.widths[level]
    kernel = FLOAT * 27 * max(temporal.widths) ** 2
    small = (height + 3) * (width + 1) > 1.25 * height * width
    if small:  # MLX's own convolution, 27 taps side by side
        return 2 * kernel + int(mode.pick(30, 50) * tensor)
    return kernel + int(mode.pick(7, 13.5) * tensor)
