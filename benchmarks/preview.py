"""Fits the map behind --preview-every to the VAE of the bundled model, and says how near it comes.

    python -m benchmarks.preview [--clips 48]

Clips that the world of the model draws are encoded; the map is the least-squares one from their
latents to what the VAE decodes from them, at the size of the latents. It is judged on clips of
held-out combinations: PSNR of the enlarged preview to the frame in the middle of those that each
latent stands for. Writes preview.json into the model's folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

import numpy as np

import mlx_sora  # noqa: F401  (before mlx.core, so that the fast BLAS is in place)
from benchmarks.shapes import world
from mlx_sora.conditioning.media import frames_by_latent
from mlx_sora.loading.model_folder import BUNDLED, find_model
from mlx_sora.loading.networks import load_vae
from mlx_sora.video.frames import to_uint8
from mlx_sora.video.preview import PREVIEW_FILE, SCALE, LatentToRGB, neighbourhoods

FRAMES, HELD_OUT = 17, 16
SHOWN = frames_by_latent(FRAMES)
ALONE = [len(frames) == 1 for frames in SHOWN]


def clips(
    choices: Sequence[world.Attributes], count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Latents [T, h, w, C] of random clips, and what the VAE makes of them, [F, H, W, 3]."""
    import mlx.core as mx

    vae, rng = load_vae(find_model(BUNDLED), ("encoder", "decoder")), np.random.default_rng(0)
    for _ in range(count):
        _, frames = world.random_clip(rng, list(choices), FRAMES)
        z = vae.encode(mx.array(frames)[None].astype(mx.float32) / 127.5 - 1)
        decoded = np.concatenate([to_uint8(chunk) for chunk in vae.decode_chunks(z, FRAMES)])
        yield np.array(z)[0], decoded.astype(np.float32) / 255


def fit(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The map [2, 9 * C + 1, 3] for latents of one frame and of several."""
    maps = []
    for one in (True, False):
        chosen = [t for t, alone in enumerate(ALONE) if alone == one]
        inputs = np.concatenate([_rows(neighbourhoods(z)[chosen]) for z, _ in pairs])
        wanted = np.concatenate([_rows(_small(frames)[chosen]) for _, frames in pairs])
        maps.append(np.linalg.lstsq(inputs, wanted, rcond=None)[0])
    return np.stack(maps)


def judged(found: LatentToRGB, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean PSNR in dB of previews to the frames in the middle of those that they stand for."""
    middles = [span[len(span) // 2] for span in SHOWN]
    errors = [
        np.square(found.decode(z, ALONE) / 255 - frames[middles]).mean() for z, frames in pairs
    ]
    return float(np.mean(-10 * np.log10(errors)))


def _small(frames: np.ndarray) -> np.ndarray:
    """Means over the frames and pixels that each latent stands for, [T, h, w, 3]."""
    means = np.stack([frames[list(span)].mean(axis=0) for span in SHOWN])
    count, height, width, colours = means.shape
    blocks = means.reshape(count, height // SCALE, SCALE, width // SCALE, SCALE, colours)
    return blocks.mean(axis=(2, 4))


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=48, help="to fit to, default 48")
    asked = parser.parse_args()
    seen, held_out = world.split()
    weights = fit(list(clips(seen, asked.clips)))
    psnr = judged(LatentToRGB(weights, 0.0), list(clips(held_out, HELD_OUT)))
    record = {"psnr": round(psnr, 1), "clips": asked.clips, "weights": weights.round(4).tolist()}
    (find_model(BUNDLED).path / PREVIEW_FILE).write_text(json.dumps(record) + "\n")
    print(f"{psnr:.1f} dB to the VAE on {HELD_OUT} held-out clips")


if __name__ == "__main__":
    main()
