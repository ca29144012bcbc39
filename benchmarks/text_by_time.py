"""Whether a clip changes with its text at the frame that the prompt names.

    python -m benchmarks.text_by_time [--pairs 12] [--json FILE] [--sheet FILE]

Pairs of held-out combinations on the same background, `[0-17] … [17-34] …`; the scorer reads each
half. Kinds: the object changes (colour and shape), or the motion. Ways: one text for all, as
the measure of what halves of 34 frames can show; both texts as one prompt; a change at once, and
over 8 and 16 frames; two clips of which the second goes on from the first. Late: frames from the
named one to the first that shows the second colour. Rows that the file has are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.common import RESULTS, markdown, write_json
from benchmarks.conditioning import spread
from benchmarks.shapes import world
from benchmarks.shapes.contact_sheet import draw_row
from benchmarks.shapes.scorer import FIELDS, read_video
from mlx_sora import Pipeline
from mlx_sora.pipeline.settings import latent_shares

HALF = world.CHUNK
KINDS = {"object": ("colour", "shape"), "motion": ("motion",)}
#: Way -> frames over which the text changes; None: not by frame.
WAYS = {"one text": None, "one prompt": None, "at once": 0, "8 frames": 8, "16 frames": 16}
WAYS |= {"two clips": None}

Pair = tuple[world.Attributes, world.Attributes]


def pairs(kind: str, count: int) -> Iterator[Pair]:
    """Yield combinations that differ in the attributes of a kind, the first held out."""
    for case, first in enumerate(spread(count)):
        rng = np.random.default_rng((47, case))
        changed = {
            name: str(rng.choice([v for v in values(name) if v != getattr(first, name)]))
            for name in KINDS[kind]
        }
        yield first, replace(first, **changed)


def values(name: str) -> list[str]:
    """Return the values of an attribute."""
    return list({getattr(each, name): None for each in world.split()[0]})


def make(pipe: Pipeline, pair: Pair, way: str, seed: int) -> np.ndarray:
    """Return the frames of a pair, uint8 [34, H, W, 3]; of two clips, those around their join."""
    one, two = map(world.caption, pair)
    prompt, options = f"[0-{HALF}] {one} [{HALF}-{2 * HALF}] {two}", {"num_frames": 2 * HALF}
    if way in ("one text", "one prompt"):
        prompt = one if way == "one text" else f"{one}, then {two}"
    elif way == "two clips":
        prompt = f"|0|{one}|1|{two}"
        options |= {"loop": 2, "condition_frames": HALF}
    shares = partial(latent_shares, blend=WAYS[way] or 0)
    with mock.patch("mlx_sora.pipeline.networks.latent_shares", shares):
        made = pipe(prompt, seed=seed, **options).frames
    assert made is not None
    return np.asarray(made)[-2 * HALF :]


def describe(made: np.ndarray, pair: Pair) -> dict[str, Any]:
    """Return what each half shows of its text, and how late the second colour comes."""
    line: dict[str, Any] = {}
    for half, (frames, truth) in enumerate(zip((made[:HALF], made[HALF:]), pair, strict=True), 1):
        reading = read_video(frames)
        for name in FIELDS:
            line[f"{name} {half}"] = bool(getattr(reading, name) == getattr(truth, name))
        line[f"all {half}"] = all(line[f"{name} {half}"] for name in FIELDS)
    line["all"] = line["all 1"] and line["all 2"]
    if pair[0].colour != pair[1].colour:
        colours = [read_video(frame[None]).colour for frame in made]
        shown = [index for index, colour in enumerate(colours) if colour == pair[1].colour]
        line["late"] = shown[0] - HALF if shown else None
    return line


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Make what is missing; write each row when it is complete."""
    known = json.loads(options.json.read_text())["rows"] if options.json.exists() else {}
    rows: dict[str, list[dict[str, Any]]] = known
    pipe, sheet = Pipeline.from_pretrained(options.model), []
    for kind in KINDS:
        for way in WAYS:
            name = f"{kind}, {way}"
            if len(rows.get(name, ())) >= options.pairs:
                continue
            lines = []
            for case, pair in enumerate(pairs(kind, options.pairs)):
                truth = (pair[0], pair[0]) if way == "one text" else pair
                made = make(pipe, pair, way, case)
                lines.append(describe(made, truth))
                if case < 3:
                    sheet.append(draw_row(f"{name}: {world.caption(pair[1])}", made))
            rows[name] = lines
            write_json(options.json, {"model": options.model, "rows": rows})
            print(show({name: lines}), flush=True)
    if options.sheet and sheet:
        Image.fromarray(np.concatenate([np.array(row) for row in sheet])).save(options.sheet)
    return rows


def show(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return a table: shares of videos, and the median of frames too late."""
    fields = [f"{name} {half}" for half in (1, 2) for name in ("colour", "shape", "motion", "all")]
    cells = []
    for name, lines in rows.items():
        late = [line["late"] for line in lines if line.get("late") is not None]
        shares = [f"{np.mean([line[field] for line in lines]):.0%}" for field in [*fields, "all"]]
        cells.append([name, *shares, f"{statistics.median(late):.0f}" if late else ""])
    return markdown(["", *fields, "all", "late"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--pairs", type=int, default=12, help="of each kind; default 12")
    parser.add_argument("--json", type=Path, default=RESULTS / "text_by_time.json")
    parser.add_argument("--sheet", type=Path, help="also draw some of the videos")
    print(show(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
