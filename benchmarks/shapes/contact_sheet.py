"""A picture of a few prompts, five frames each: `python -m benchmarks.shapes.contact_sheet OUT`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.shapes import world
from benchmarks.shapes.score import Generate, pipeline_generator

COLUMNS, FRAMES, CAPTION = 2, 5, 14


def draw_row(prompt: str, frames: np.ndarray) -> Image.Image:
    """A prompt and FRAMES of its frames, evenly spread."""
    picked = frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]
    row = Image.new("RGB", (FRAMES * (world.SIZE + 2), world.SIZE + CAPTION + 4), "white")
    ImageDraw.Draw(row).text((0, 0), prompt, fill="black")
    for index, frame in enumerate(picked):
        row.paste(Image.fromarray(frame), (index * (world.SIZE + 2), CAPTION))
    return row


def contact_sheet(generate: Generate, count: int = 12) -> Image.Image:
    """Held-out prompts spread over the list, seed 0 and up, COLUMNS side by side."""
    held_out = world.split()[1]
    chosen = [held_out[i * len(held_out) // count] for i in range(count)]
    rows = [draw_row(world.caption(a), generate(world.caption(a), i)) for i, a in enumerate(chosen)]
    width, height = rows[0].size
    lines = -(-count // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + 12), lines * height), "white")
    for index, row in enumerate(rows):
        sheet.paste(row, (index // lines * (width + 12), index % lines * height))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="shapes", help="name or folder")
    parser.add_argument("--num-frames", type=int, default=world.CHUNK)
    asked = parser.parse_args()
    generate = pipeline_generator(asked.model, num_frames=asked.num_frames)
    contact_sheet(generate).save(asked.out, optimize=True)


if __name__ == "__main__":
    main()
