"""Training of the two-stage VAE: spatial alone, temporal on its latents, then both together.

The decoders learn on alone (`train_decode`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import world
from benchmarks.shapes.run_state import Average, RunState, schedule, set_rate
from benchmarks.shapes.torch_vae import LATENT_FACTOR, SpatialConfig, TemporalConfig, VideoVAE

SPATIAL_STEPS, TEMPORAL_STEPS, SHARPEN_STEPS, REFINE_STEPS = 1100, 700, 900, 500


def new_vae() -> VideoVAE:
    """The bundled model's VAE with fresh weights."""
    torch.manual_seed(0)
    vae = VideoVAE(SpatialConfig(), TemporalConfig())
    vae.spatial_vae.to(memory_format=torch.channels_last)
    return vae


def averaged(folder: Path, phase: str) -> VideoVAE:
    """The VAE of a phase with averaged weights, latents not yet normalised."""
    vae = new_vae()
    vae.load_state_dict(torch.load(folder / f"{phase}.pt", weights_only=False)["parts"]["average"])
    vae.shift.zero_()
    vae.scale.fill_(1)
    return vae


def to_unit(frames: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def random_chunk(rng: np.random.Generator, choices: list[world.Attributes]) -> np.ndarray:
    """17 consecutive frames as the VAE sees them: a chunk of a clip of 17, 34 or 51 frames."""
    chunks = int(rng.choice([1, 1, 1, 2, 3]))
    first = rng.integers(chunks) * world.CHUNK
    times = np.linspace(0, 1, chunks * world.CHUNK)[first : first + world.CHUNK]
    return _draw(rng, choices, times)


def random_frame(rng: np.random.Generator, choices: list[world.Attributes]) -> np.ndarray:
    """One frame [1, 64, 64, 3] out of a random video."""
    return _draw(rng, choices, rng.random(1))


def _draw(
    rng: np.random.Generator, choices: list[world.Attributes], times: np.ndarray
) -> np.ndarray:
    attributes = choices[rng.integers(len(choices))]
    return world.render(attributes, world.random_path(attributes.motion, rng), times)


def chunk_batch(rng: np.random.Generator, choices: list[world.Attributes], count: int) -> Tensor:
    """[count, 3, 17, 64, 64] in [-1, 1]."""
    frames = np.concatenate([random_chunk(rng, choices) for _ in range(count)])
    return to_unit(frames).unflatten(0, (count, -1)).transpose(1, 2)


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of videos in [-1, 1]."""
    return float(-10 * torch.log10(F.mse_loss(x.clamp(-1, 1), y) / 4))


def _kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def _error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean() + 2.0 * F.mse_loss(output, target)


def _sample(mean: Tensor, logvar: Tensor, most: float = 100.0) -> Tensor:
    """A draw from the posterior, with a standard deviation of at most `most`."""
    return mean + torch.randn_like(mean) * (0.5 * logvar).exp().clamp(max=most)


def train_spatial(folder: Path, choices: list[world.Attributes]) -> None:
    """Images only; writes the phase `spatial`."""
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.spatial_vae.parameters(), 1e-3, (0.9, 0.98))
    run = RunState(folder, "spatial", {"vae": vae, "optimizer": optimizer}, seed=1)
    while run.step < SPATIAL_STEPS:
        set_rate(optimizer, schedule(run.step, SPATIAL_STEPS, 2e-3, floor=0.15))
        frames = np.concatenate([random_frame(run.rng, choices) for _ in range(32)])
        x = to_unit(frames).contiguous(memory_format=torch.channels_last)
        mean, logvar = vae.spatial.moments(x)
        y = vae.spatial.decode(_sample(mean, logvar))
        loss = _error(y, x) + 1e-4 * _kl(mean, logvar)
        _update(loss, optimizer, vae)
        run.step += 1
        if run.step % 50 == 0:
            run.log(loss=loss.item(), psnr=psnr(y.detach(), x), std=mean.std().item())
        if run.step % 200 == 0 or run.step == SPATIAL_STEPS:
            run.save()


def train_temporal(folder: Path, choices: list[world.Attributes]) -> None:
    """The temporal VAE on the frozen spatial one's latents; writes the phase `temporal`."""
    vae = new_vae()
    vae.load_state_dict(torch.load(folder / "spatial.pt", weights_only=False)["parts"]["vae"])
    optimizer = torch.optim.AdamW(vae.temporal_vae.parameters(), 1e-3, (0.9, 0.98))
    run = RunState(folder, "temporal", {"vae": vae, "optimizer": optimizer}, seed=2)
    while run.step < TEMPORAL_STEPS:
        set_rate(optimizer, schedule(run.step, TEMPORAL_STEPS, 2e-3, floor=0.15))
        with torch.no_grad():
            target = spatial_latents(vae, chunk_batch(run.rng, choices, 6))
        mean, logvar = vae.temporal_vae.moments(target)
        y = vae.temporal_vae.decode(_sample(mean, logvar), world.CHUNK)
        relative = F.mse_loss(y, target) / target.var()
        loss = relative + (y - target).abs().mean() / target.std() + 1e-3 * _kl(mean, logvar)
        _update(loss, optimizer, vae)
        run.step += 1
        if run.step % 50 == 0:
            run.log(loss=loss.item(), relative=relative.item(), std=mean.std().item())
        if run.step % 200 == 0 or run.step == TEMPORAL_STEPS:
            run.save()


def train_sharpen(folder: Path, choices: list[world.Attributes]) -> None:
    """The spatial VAE once more, from a high rate to a low one, hardly any KL; phase `sharpen`."""
    vae = new_vae()
    vae.load_state_dict(torch.load(folder / "temporal.pt", weights_only=False)["parts"]["vae"])
    optimizer = torch.optim.AdamW(vae.spatial_vae.parameters(), 1e-3, (0.9, 0.98))
    run = RunState(folder, "sharpen", {"vae": vae, "optimizer": optimizer}, seed=3)
    while run.step < SHARPEN_STEPS:
        set_rate(optimizer, schedule(run.step, SHARPEN_STEPS, 1.2e-3, floor=0.03))
        frames = np.concatenate([random_frame(run.rng, choices) for _ in range(32)])
        x = to_unit(frames).contiguous(memory_format=torch.channels_last)
        mean, logvar = vae.spatial.moments(x)
        y = vae.spatial.decode(_sample(mean, logvar, 0.1))
        loss = _error(y, x) + 1e-5 * _kl(mean, logvar)
        _update(loss, optimizer, vae)
        run.step += 1
        if run.step % 50 == 0:
            run.log(loss=loss.item(), psnr=psnr(y.detach(), x), std=mean.std().item())
        if run.step % 100 == 0 or run.step == SHARPEN_STEPS:
            run.save()


def train_refine(folder: Path, choices: list[world.Attributes]) -> None:
    """All but the spatial encoder, end to end, few decoded frames of many clips; phase `refine`."""
    vae = new_vae()
    vae.load_state_dict(torch.load(folder / "sharpen.pt", weights_only=False)["parts"]["vae"])
    trained = [*vae.temporal_vae.parameters(), *vae.spatial.decoder.parameters()]
    trained += vae.spatial.post_quant_conv.parameters()
    optimizer = torch.optim.AdamW(trained, 1e-3, (0.9, 0.98))
    average = Average(vae, 0.99)
    parts = {"vae": vae, "optimizer": optimizer, "average": average}
    run = RunState(folder, "refine", parts, seed=9)
    while run.step < REFINE_STEPS:
        set_rate(optimizer, schedule(run.step, REFINE_STEPS, 1e-3))
        x = chunk_batch(run.rng, choices, 6)
        if run.step % 12 == 0:
            images = np.concatenate([random_frame(run.rng, choices) for _ in range(64)])
            x = to_unit(images)[:, :, None]
        frames = x.shape[2]
        with torch.no_grad():
            target = spatial_latents(vae, x)
        mean, logvar = vae.temporal_vae.moments(target)
        z = vae.temporal_vae.decode(_sample(mean, logvar, 0.2), frames)
        picked = torch.randperm(frames)[:5]
        y = vae.spatial.decode((z[:, :, picked] / LATENT_FACTOR).transpose(1, 2).flatten(0, 1))
        truth = x[:, :, picked].transpose(1, 2).flatten(0, 1)
        near = F.mse_loss(z, target) / target.var()
        loss = _error(y, truth) + 0.1 * near + 2e-5 * _kl(mean, logvar)
        _update(loss, optimizer, vae)
        run.step += 1
        average.update(vae, run.step)
        if run.step % 25 == 0:
            run.log(
                loss=loss.item(),
                psnr=psnr(y.detach(), truth),
                relative=near.item(),
                weakest=mean.std((0, 2, 3, 4)).min().item(),
                posterior=(0.5 * logvar).exp().mean().item(),
            )
        if run.step % 100 == 0 or run.step == REFINE_STEPS:
            run.save()


def spatial_latents(vae: VideoVAE, x: Tensor) -> Tensor:
    """Spatial mean latents [B, 4, F, h, w] of [B, 3, F, H, W], with the pipeline's factor."""
    images = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    mean, _ = vae.spatial.moments(images)
    return mean.unflatten(0, (x.shape[0], -1)).transpose(1, 2) * LATENT_FACTOR


def _update(loss: Tensor, optimizer: torch.optim.Optimizer, vae: VideoVAE) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
