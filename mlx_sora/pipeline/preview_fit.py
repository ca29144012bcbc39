"""Fitting of a preview map to the VAE of a model.

Clips are encoded and decoded by the VAE. The decoded patches have few main directions; a network
is trained to find their coordinates from the latents, by Adam on the mean squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import optimizers

from mlx_sora.conditioning.media import frames_by_latent
from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_vae
from mlx_sora.loading.preview_map import vae_numbers
from mlx_sora.models.preview_map import Layers, PreviewMap, apply_layers, preview_features
from mlx_sora.models.vae import Chunk, VideoVAE
from mlx_sora.models.vae_spatial import NETWORKS
from mlx_sora.video.reader import is_video, read_image, read_video

#: Frames of a clip: one chunk. Clips and steps of a fit; longest side of its clips.
FRAMES, CLIPS, STEPS, MAX_SIDE = 17, 96, 2000, 128

#: Sides of the patches, main directions of their values, and width of both hidden layers.
_PATCH, _DIRECTIONS, _WIDTH = 8, 24, 64

#: Places per step of the training, and the first rate.
_BATCH, _RATE = 1024, 4e-3


@dataclass(frozen=True)
class PreviewClip:
    """A clip for the fit: latents [T, h, w, C], and the VAE's middle frame of each [T, H, W, 3]."""

    latents: mx.array
    frames: np.ndarray
    chunks: Sequence[Chunk]


def encode_clip(vae: VideoVAE, frames: np.ndarray) -> PreviewClip:
    """Return what the VAE makes of uint8 [F, H, W, 3], F at most 17."""
    count = len(frames)
    z = vae.encode(mx.array(frames)[None].astype(mx.float32) / 127.5 - 1)
    decoded = np.concatenate([np.array(chunk) for chunk in vae.decode_chunks(z, count)])
    middles = [span[len(span) // 2] for span in frames_by_latent(count)]
    rgb = np.clip(decoded[middles] / 2 + 0.5, 0, 1)
    return PreviewClip(z[0], rgb, vae.chunks(count))


def fit_preview_map(
    clips: Sequence[PreviewClip],
    held_out: Sequence[PreviewClip],
    vae: tuple[float, ...],
    steps: int = STEPS,
    on_progress: Callable[[int], None] = lambda done: None,
) -> PreviewMap:
    """Return the map for `clips`, with its PSNR on those that are held out.

    vae: its numbers (`vae_numbers`). on_progress: called with the number of finished steps.
    """
    x = mx.concatenate([_rows(preview_features(clip.latents, clip.chunks)) for clip in clips])
    patches = np.concatenate([_patches(clip.frames) for clip in clips])
    mean, directions = patches.mean(axis=0), _main_directions(patches)
    targets = mx.array((patches - mean) @ directions)
    *hidden, (weight, bias) = _train(x, targets, steps, on_progress)
    last = weight @ mx.array(directions.T), bias @ mx.array(directions.T) + mx.array(mean)
    found = PreviewMap(((*hidden, last),), 0.0, vae)
    return replace(found, psnr=float(np.mean([psnr(found, clip) for clip in held_out])))


def psnr(found: PreviewMap, clip: PreviewClip) -> float:
    """Return the PSNR in dB of the previews of a clip to the VAE's frames."""
    shown = np.array(found(clip.latents, clip.chunks, _PATCH))
    return float(-10 * np.log10(max(np.square(shown - clip.frames).mean(), 1e-10)))


def fit_model(
    model: ModelFolder,
    clips: Sequence[np.ndarray],
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> PreviewMap:
    """Return the map for the VAE of a model, judged on every eighth clip, uint8 [17, H, W, 3].

    on_progress: called with what is done of how much, of "clips" and "fit".
    """
    vae, seen = load_vae(model, NETWORKS), list[PreviewClip]()
    numbers = vae_numbers(model, vae)
    for done, frames in enumerate(clips, start=1):
        seen.append(encode_clip(vae, frames))
        on_progress("clips", done, len(clips))
    held_out = seen[::8]
    fitted = [clip for index, clip in enumerate(seen) if index % 8] or seen
    return fit_preview_map(
        fitted, held_out, numbers, STEPS, lambda done: on_progress("fit", done, STEPS)
    )


def material_clips(model: ModelFolder, files: Sequence[str]) -> list[np.ndarray]:
    """Return clips uint8 [17, H, W, 3] of videos and images, or drawn ones without files.

    Raises UsageError for files that cannot be read.
    """
    width, height = (min(MAX_SIDE, side) for side in (model.defaults.width, model.defaults.height))
    size = Size(width // _PATCH * _PATCH, height // _PATCH * _PATCH)
    if not files:
        return list(random_clips(CLIPS, size))
    found = list[np.ndarray]()
    for file in files:
        if not is_video(file):
            found.append(np.repeat(read_image(file, size)[None], FRAMES, axis=0))
            continue
        frames = read_video(file, CLIPS * FRAMES, size=size).frames
        cuts = range(0, len(frames) - FRAMES + 1, FRAMES)
        found += [frames[start : start + FRAMES] for start in cuts]
    if not found:
        raise UsageError(
            f"The videos have fewer than {FRAMES} frames each.", "Give longer ones, or images."
        )
    return found[:: -(-len(found) // CLIPS)]


def random_clips(count: int, size: Size, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield clips uint8 [17, H, W, 3]: shapes that move over smooth colours and fine patterns."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size.height, : size.width] / max(size)
    for _ in range(count):
        drift, frames = rng.normal(0, 0.02, (2, 2)), []
        waves = rng.normal(0, 1, (4, 2)) * rng.choice([1, 4, 16], (4, 1))
        strength = rng.uniform(0, 0.12, (4, 3)) * (rng.random() < 0.5)
        shapes = [_random_shape(rng) for _ in range(rng.integers(1, 5))]
        ground, slope = rng.random(3), rng.normal(0, 0.3, (2, 3)) * (rng.random() < 0.5)
        for t in range(FRAMES):
            y, x = rows + drift[0, 0] * t, columns + drift[0, 1] * t
            picture = ground + y[..., None] * slope[0] + x[..., None] * slope[1]
            for wave, colour in zip(waves, strength, strict=True):
                picture = picture + np.sin(6.3 * (wave[0] * y + wave[1] * x))[..., None] * colour
            for inside, colour in shapes:
                picture = np.where(inside(rows, columns, t)[..., None], colour, picture)
            frames.append(np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8))
        yield np.stack(frames)


def _random_shape(
    rng: np.random.Generator,
) -> tuple[Callable[[np.ndarray, np.ndarray, int], np.ndarray], np.ndarray]:
    """Return a test of whether places lie inside a moving, growing shape, and its colour."""
    centre, speed = rng.random(2), rng.normal(0, 0.012, 2)
    radius, growth, power = rng.uniform(0.08, 0.35), rng.normal(0, 0.004), rng.choice([1, 2, 20])
    stretch = rng.uniform(0.6, 1.6)

    def inside(rows: np.ndarray, columns: np.ndarray, t: int) -> np.ndarray:
        y = np.abs(rows - centre[0] - speed[0] * t) * stretch
        x = np.abs(columns - centre[1] - speed[1] * t)
        found: np.ndarray = y**power + x**power < max(0.01, radius + growth * t) ** power
        return found

    return inside, rng.random(3)


def _train(
    x: mx.array, targets: mx.array, steps: int, on_progress: Callable[[int], None]
) -> Layers:
    """Return layers from features [N, n] to coordinates [N, k]."""
    rng = np.random.default_rng(0)
    sizes = [x.shape[1], _WIDTH, _WIDTH, targets.shape[1]]
    parameters: dict[str, Any] = {"weight": [], "bias": []}
    for size, width in pairwise(sizes):
        start = rng.normal(0, size**-0.5, (size, width)).astype(np.float32)
        parameters["weight"].append(mx.array(start))
        parameters["bias"].append(mx.zeros((width,)))
    optimizer = optimizers.Adam(optimizers.cosine_decay(_RATE, steps))

    def loss(parameters: dict[str, Any], x: mx.array, target: mx.array) -> mx.array:
        layers = tuple(zip(parameters["weight"], parameters["bias"], strict=True))
        return mx.square(apply_layers(layers, x) - target).sum(axis=-1).mean()

    gradient = mx.grad(loss)
    for step in range(steps):
        chosen = mx.array(rng.integers(0, x.shape[0], _BATCH))
        parameters = optimizer.apply_gradients(
            gradient(parameters, x[chosen], targets[chosen]), parameters
        )
        mx.eval(parameters, optimizer.state)
        on_progress(step + 1)
    return tuple(zip(parameters["weight"], parameters["bias"], strict=True))


def _main_directions(patches: np.ndarray) -> np.ndarray:
    """Return the directions [n, k] in which patches [N, n] vary most."""
    _, vectors = np.linalg.eigh(np.cov(patches.T))
    main: np.ndarray = vectors[:, -_DIRECTIONS:].astype(np.float32)
    return main


def _patches(frames: np.ndarray) -> np.ndarray:
    """Return the patches of [T, H, W, 3] as rows of 3 * patch ** 2 values."""
    count, height, width, _ = frames.shape
    cut = frames.reshape(count, height // _PATCH, _PATCH, width // _PATCH, _PATCH, 3)
    patches: np.ndarray = cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3 * _PATCH**2)
    return patches


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])
