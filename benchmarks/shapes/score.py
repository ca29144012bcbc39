"""Scores a shapes model on the held-out prompts: `python -m benchmarks.shapes.score`.

Runs the engine's own pipeline, one seed per prompt. Anything else that turns a prompt and a seed
into frames can be scored too, through `score_generator`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import world
from benchmarks.shapes.scorer import Reading, read_video, score
from mlx_sora import Pipeline

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


def pipeline_generator(model: str | Path, **options: Any) -> Generate:
    """The engine; options: fields of GenerationRequest."""
    pipe = Pipeline.from_pretrained(model)

    def generate(prompt: str, seed: int) -> np.ndarray:
        frames = pipe(prompt, seed=seed, **options).frames
        assert frames is not None, "no output was asked for"
        return frames

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="shapes", help="name or folder")
    parser.add_argument("--num-frames", type=int, default=world.CHUNK)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--limit", type=int, help="score only the first N prompts")
    asked = parser.parse_args()
    started = time.monotonic()
    generate = pipeline_generator(
        asked.model, num_frames=asked.num_frames, steps=asked.steps, guidance=asked.guidance
    )
    table, _ = score_generator(generate, asked.limit)
    table["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
