"""Fits the map behind --preview-every to the VAE of the bundled model, and says how near it comes.

    python -m benchmarks.preview [--clips 200] [--steps 6000] [--sheet FILE.png]
    python -m benchmarks.preview --clips 0      judges the map that is there

Clips that the world of the model draws are encoded and decoded by the VAE; `pipeline/preview_fit`
fits the map to them. It is judged on clips of held-out combinations: PSNR of the preview to the
frame in the middle of those that each latent stands for. Writes preview.json into the model's
folder; `python -m tests.invariants.bundled` then renews the records of that folder. --sheet: a
picture of held-out clips, previews above what the VAE shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

import mlx_sora  # noqa: F401  (before mlx.core, so that the fast BLAS is in place)
from benchmarks.common import RESULTS, seconds, write_json
from benchmarks.shapes import world
from mlx_sora.loading.model_folder import BUNDLED, find_model
from mlx_sora.loading.networks import load_vae
from mlx_sora.loading.preview_map import load_preview_map, save_preview_map, vae_numbers
from mlx_sora.models.preview_map import PreviewMap
from mlx_sora.models.vae import VideoVAE
from mlx_sora.pipeline.preview import map_latents
from mlx_sora.pipeline.preview_fit import FRAMES, PreviewClip, encode_clip, fit_preview_map, psnr
from mlx_sora.video.preview import PREVIEW_FILE, enlarge

HELD_OUT = 16


def clips(vae: VideoVAE, choices: Sequence[world.Attributes], count: int) -> list[PreviewClip]:
    """Return random clips of the world as the VAE shows them."""
    rng = np.random.default_rng(0)
    drawn = (world.random_clip(rng, list(choices), FRAMES)[1] for _ in range(count))
    return [encode_clip(vae, frames) for frames in drawn]


def sheet(found: PreviewMap, shown: Sequence[PreviewClip]) -> np.ndarray:
    """Return previews of clips above the VAE's frames, enlarged, uint8 [H, W, 3]."""
    rows = []
    for clip in shown:
        preview = np.array(found(clip.latents, clip.chunks, found.patch))
        rows += [np.concatenate(list(each), axis=1) for each in (preview, clip.frames)]
    columns = [np.concatenate(rows[i : i + 8], axis=0) for i in range(0, len(rows), 8)]
    picture = np.rint(np.concatenate(columns, axis=1) * 255).astype(np.uint8)
    return enlarge(picture[None], 2)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=200, help="to fit to, default 200")
    parser.add_argument("--steps", type=int, default=6000, help="of the fit, default 6000")
    parser.add_argument("--sheet", help="png of held-out clips to write")
    asked = parser.parse_args()
    model, (seen, unseen) = find_model(BUNDLED), world.split()
    vae, path = load_vae(model, ("encoder", "decoder")), model.path / PREVIEW_FILE
    held_out = clips(vae, unseen, HELD_OUT)
    if asked.clips:
        numbers, fitted = vae_numbers(model, vae), clips(vae, seen, asked.clips)
        fit = fit_preview_map(fitted, held_out, numbers, asked.steps)
        save_preview_map(path, fit, overwrite=True)
    found = load_preview_map(model, vae.config.temporal.embed_dim)
    assert found is not None, "it was fitted"
    result = judged(found, held_out) | {"bytes": path.stat().st_size}
    print(result)
    write_json(RESULTS / "preview.json", result)
    if asked.sheet:
        from PIL import Image

        Image.fromarray(sheet(found, held_out)).save(asked.sheet)


def judged(found: PreviewMap, held_out: Sequence[PreviewClip]) -> dict[str, object]:
    """Return dB to the VAE on held-out clips, and milliseconds of a preview of 17 frames."""
    import mlx.core as mx

    values = [psnr(found, clip) for clip in held_out]
    z = held_out[0].latents
    times = [seconds(lambda: map_latents(found, z, FRAMES)) for _ in range(21)]
    wide = mx.random.normal((15, 30, 53, z.shape[-1]))
    wide_times = [seconds(lambda: map_latents(found, wide, 51)) for _ in range(5)]
    return {
        "clips": len(values),
        "psnr": round(float(np.mean(values)), 2),
        "worst_psnr": round(min(values), 2),
        "ms_17_frames_64x64": round(1000 * float(np.median(times)), 1),
        "ms_51_frames_240p": round(1000 * float(np.median(wide_times)), 1),
    }


if __name__ == "__main__":
    main()
