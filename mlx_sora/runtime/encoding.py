"""Peak memory of the encoders' activations, by shapes and measured factors; see `activations`."""

from __future__ import annotations

from mlx_sora.models.vae import VAEConfig
from mlx_sora.runtime.activations import Mode
from mlx_sora.runtime.plan import FLOAT


def spatial_encoder_work(
    config: VAEConfig, height: int, width: int, frames: int, mode: Mode
) -> int:
    """The image encoder on `frames` frames of `height` x `width` pixels at once."""
    widths = config.spatial.block_out_channels
    kernel = FLOAT * 9 * max(widths) ** 2
    return int(mode.pick(7, 15) * FLOAT * frames * height * width * widths[0]) + 2 * kernel


def temporal_encoder_work(
    config: VAEConfig, frames: int, height: int, width: int, mode: Mode
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
