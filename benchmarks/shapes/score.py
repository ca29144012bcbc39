"""Scores a shapes model on the held-out prompts: `python -m benchmarks.shapes.score --model PATH`.

Anything that turns a prompt and a seed into frames can be scored, through `score_generator`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.shapes import world
from benchmarks.shapes.scorer import Reading, read_video, score

Generate = Callable[[str, int], np.ndarray]


def score_generator(
    generate: Generate, limit: int | None = None
) -> tuple[dict[str, float], list[Reading]]:
    """Table of hit rates over the held-out prompts, seed i for prompt i, and all readings.

    `generate(prompt, seed)` returns uint8 frames [F, H, W, 3].
    """
    truths = world.split()[1][:limit]
    readings = [read_video(generate(world.caption(a), i)) for i, a in enumerate(truths)]
    return score(readings, truths), readings


def torch_generator(
    model: Path, frames: int = world.CHUNK, steps: int = 30, guidance: float | None = None
) -> Generate:
    """The shipped model through the PyTorch reference models."""
    import torch

    from benchmarks.shapes import export, sample
    from benchmarks.shapes.captions import Tokenizer

    t5, dit, vae = (
        export.read_text_encoder(model),
        export.read_transformer(model),
        export.read_vae(model),
    )
    tokenizer = Tokenizer(model / "tokenizer" / "spiece.model")
    strength = export.read_guidance(model) if guidance is None else guidance

    def generate(prompt: str, seed: int) -> np.ndarray:
        with torch.no_grad():
            text = t5(*tokenizer.batch([prompt]))[0]
        noise = sample.seeded_noise(seed, frames)[None]
        z = sample.sample_latents(dit, [text], noise, steps, strength, frames)
        return sample.decode_frames(vae, z, frames)[0]

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=world.CHUNK)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--limit", type=int, default=None, help="score only the first N prompts")
    options = parser.parse_args()
    started = time.monotonic()
    generate = torch_generator(options.model, options.frames, options.steps, options.guidance)
    table, _ = score_generator(generate, options.limit)
    table["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
