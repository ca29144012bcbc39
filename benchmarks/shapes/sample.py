"""Rectified-flow sampling with the PyTorch models, as the engine does it; used to score."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import world
from benchmarks.shapes.torch_stdit import STDiT3
from benchmarks.shapes.torch_vae import VideoVAE

GUIDANCE, IMAGE_FPS = 2.0, 120.0


def timesteps(steps: int, frames: int) -> list[float]:
    """Decreasing times in (0, 1], transformed for resolution and length as in Open-Sora 1.2."""
    count = 1 if frames == 1 else frames // world.CHUNK * 5
    ratio = math.sqrt(world.SIZE * world.SIZE / 512**2) * math.sqrt(count)
    uniform = [1 - i / steps for i in range(steps)]
    return [ratio * u / (1 + (ratio - 1) * u) for u in uniform]


@torch.no_grad()
def sample_latents(
    model: STDiT3,
    texts: list[Tensor],
    noise: Tensor,
    steps: int,
    guidance: float,
    frames: int,
) -> Tensor:
    """Denoise `noise` [B, 4, T, 8, 8] for caption embeddings `texts` (each [n, C])."""
    length = max(len(text) for text in texts)
    y = torch.zeros(len(texts), length, texts[0].shape[-1])
    mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for i, text in enumerate(texts):
        y[i, : len(text)], mask[i, : len(text)] = text, True
    times, z = timesteps(steps, frames), noise
    for now, after in zip(times, [*times[1:], 0.0], strict=True):
        z = z + guided_velocity(model, z, (y, mask), now, guidance) * (now - after)
    return z


def guided_velocity(
    model: STDiT3,
    z: Tensor,
    text: tuple[Tensor, Tensor],
    time: float,
    guidance: float,
    generated: Tensor | None = None,
) -> Tensor:
    """Velocity [B, 4, T, 8, 8] at `time` in (0, 1].

    text: embeddings [B, L, C] and mask [B, L]; generated: [B, T], all if None.
    """
    y, mask = text
    null = model.y_embedder.y_embedding[: y.shape[1]].expand_as(y)
    text = torch.cat([y, torch.where(mask[..., None], null, 0.0)]), torch.cat([mask, mask])
    fps = IMAGE_FPS if z.shape[2] == 1 else float(world.FPS)
    t = torch.full((2 * len(z),), time * 1000)
    keep = None if generated is None else torch.cat([generated, generated])
    v = model(torch.cat([z, z]), t, text, (float(world.SIZE), float(world.SIZE), fps), keep)
    conditional, unconditional = v[:, : z.shape[1]].chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def decode_frames(vae: VideoVAE, z: Tensor, frames: int) -> np.ndarray:
    """uint8 [B, F, H, W, 3] of latents, one video at a time."""
    videos = [vae.decode(row[None], frames)[0] for row in z]
    x = (torch.stack(videos).permute(0, 2, 3, 4, 1).clamp(-1, 1) + 1) * 127.5
    return x.round().to(torch.uint8).numpy()


def seeded_noise(seed: int, frames: int) -> Tensor:
    """[4, T, 8, 8] of one seed."""
    generator = torch.Generator().manual_seed(seed)
    count = 1 if frames == 1 else frames // world.CHUNK * 5
    return torch.randn(4, count, world.SIZE // 8, world.SIZE // 8, generator=generator)
