"""How far pictures decoded in tiles (`--vae-tiles`) are from those decoded whole.

    python -m benchmarks.tiles [--prompts 8] [--frames 4] [--json FILE]

On the bundled model: at its own size, and at 512 x 512 pixels, for which its videos are enlarged
and encoded again. PSNR compares 8-bit frames with those of the whole picture; peaks are MLX's.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, markdown, write_json
from benchmarks.shapes import world
from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.geometry import MAX_TILES
from mlx_sora.runtime.events import StepFinished

SIZES = (64, 512)


@dataclass(frozen=True)
class Row:
    """Medians over prompts. side: pixels; tiles: in a row; psnr: dB; least: the worst prompt's;
    memory: transient peak in bytes, whole: that of the whole picture.
    """

    side: int
    tiles: int
    psnr: float
    least: float
    memory: int
    whole: int


def latents_of(pipe: Pipeline, seed: int) -> object:
    """Latents of one chunk that the bundled model makes of a held-out prompt."""
    prompt = world.caption(world.split()[1][seed])
    request = GenerationRequest(prompt, seed=seed, num_frames=17, steps=20)
    events = [e for e in pipe.stream(request) if isinstance(e, StepFinished)]
    return events[-1].latents


def measure(options: argparse.Namespace) -> list[Row]:
    import mlx.core as mx

    from mlx_sora.loading.networks import load_vae
    from mlx_sora.memory.limits import memory_scope, release
    from mlx_sora.models.vae_tiling import decode_tiled
    from mlx_sora.video.frames import to_uint8

    pipe = Pipeline.from_pretrained("shapes")
    vae = load_vae(pipe.model, ("encoder", "decoder"))
    chunk = vae.chunks(17)[0]
    found: dict[tuple[int, int], list[tuple[float, int, int]]] = {}

    def decoded(x: mx.array, tiles: int) -> tuple[np.ndarray, int]:
        release()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        frames = [
            to_uint8(decode_tiled(vae.spatial_vae, x[i : i + 1], tiles)) for i in range(x.shape[0])
        ]
        return np.concatenate(frames).astype(np.float64), mx.get_peak_memory() - before

    with memory_scope():
        for seed in range(options.prompts):
            own = vae._decode_time(latents_of(pipe, seed), chunk, None)[: options.frames]
            for side in SIZES:
                x = own
                if side > SIZES[0]:
                    frames = np.clip(np.array(vae.spatial_vae.decode(own)), -1, 1)
                    large = frames.repeat(side // SIZES[0], 1).repeat(side // SIZES[0], 2)
                    x = vae.spatial_vae.encode(mx.array(large))[..., : own.shape[-1]]
                whole, peak = decoded(x, 1)
                for tiles in range(2, MAX_TILES + 1):
                    frames, less = decoded(x, tiles)
                    error = float(((frames - whole) ** 2).mean())
                    psnr = 10 * math.log10(255**2 / error)
                    found.setdefault((side, tiles), []).append((psnr, less, peak))
            print(f"{seed + 1} of {options.prompts} prompts", flush=True)
    return [
        Row(
            side,
            tiles,
            psnr=statistics.median(psnr for psnr, _, _ in some),
            least=min(psnr for psnr, _, _ in some),
            memory=max(less for _, less, _ in some),
            whole=max(peak for _, _, peak in some),
        )
        for (side, tiles), some in sorted(found.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8, help="default 8")
    parser.add_argument("--frames", type=int, default=4, help="of each; default 4")
    parser.add_argument("--json", type=Path, default=RESULTS / "tiles.json")
    options = parser.parse_args()
    rows = measure(options)
    print(
        markdown(
            ["side", "tiles", "PSNR", "worst", "peak MB", "whole MB"],
            [
                [
                    str(row.side),
                    f"{row.tiles} x {row.tiles}",
                    f"{row.psnr:.1f}",
                    f"{row.least:.1f}",
                    f"{row.memory / 1e6:.0f}",
                    f"{row.whole / 1e6:.0f}",
                ]
                for row in rows
            ],
        )
    )
    setting = {"prompts": options.prompts, "frames": options.frames}
    write_json(options.json, {**setting, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
