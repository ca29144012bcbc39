"""How far videos of a VAE in half precision (`--vae-dtype`) are from those in float32.

    python -m benchmarks.vae_dtype [--prompts 8] [--frames 4] [--json FILE]

On the bundled model: at its own size, and at 512 x 512 pixels, for which its videos are enlarged
and encoded again. PSNR compares 8-bit frames. MLX's CPU backend convolves half precision in float32
and rounds the result, as GPUs do.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, markdown, write_json
from benchmarks.tiles import SIZES, latents_of
from mlx_sora import Pipeline

DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Row:
    """Medians over prompts. side: pixels. psnr: dB of decoded frames; least: the worst prompt's.
    encoder: error of the latents over their root mean square.
    """

    side: int
    dtype: str
    psnr: float
    least: float
    encoder: float


def measure(options: argparse.Namespace) -> list[Row]:
    import mlx.core as mx

    from mlx_sora.loading.networks import load_vae
    from mlx_sora.video.frames import to_uint8

    pipe, parts = Pipeline.from_pretrained("shapes"), ("encoder", "decoder")
    exact = load_vae(pipe.model, parts)
    halves = {name: load_vae(pipe.model, parts, getattr(mx, name)) for name in DTYPES}
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for seed in range(options.prompts):
        latents = latents_of(pipe, seed)
        frames = exact.decode(latents, 17)[:, : options.frames]
        for side in SIZES:
            scale = side // SIZES[0]
            pixels = mx.repeat(mx.repeat(mx.clip(frames, -1, 1), scale, 2), scale, 3)
            z = exact.encode(pixels)
            whole = to_uint8(exact.decode(z, options.frames)[0]).astype(np.float64)
            for name, vae in halves.items():
                out = to_uint8(vae.decode(z, options.frames)[0])
                psnr = 10 * math.log10(255**2 / float(((out - whole) ** 2).mean()))
                error = mx.sqrt(((vae.encode(pixels) - z) ** 2).mean() / (z**2).mean())
                found.setdefault((side, name), []).append((psnr, float(error.item())))
        print(f"{seed + 1} of {options.prompts} prompts", flush=True)
    return [
        Row(
            side,
            name,
            psnr=statistics.median(psnr for psnr, _ in some),
            least=min(psnr for psnr, _ in some),
            encoder=statistics.median(error for _, error in some),
        )
        for (side, name), some in sorted(found.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8, help="default 8")
    parser.add_argument("--frames", type=int, default=4, help="of each; default 4")
    parser.add_argument("--json", type=Path, default=RESULTS / "vae_dtype.json")
    options = parser.parse_args()
    rows = measure(options)
    print(
        markdown(
            ["side", "type", "PSNR", "worst", "encoder's error"],
            [
                [
                    str(row.side),
                    row.dtype,
                    f"{row.psnr:.1f}",
                    f"{row.least:.1f}",
                    f"{row.encoder:.2%}",
                ]
                for row in rows
            ],
        )
    )
    setting = {"prompts": options.prompts, "frames": options.frames}
    write_json(options.json, {**setting, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
