"""What is kept of a given first frame, and whether a long video shows where its clips join.

    python -m benchmarks.conditioning [--cases 48] [--loops 12] [--json FILE] [--sheet FILE]

First frame: the world draws the first frame of held-out videos, the bundled model continues it
under their captions; by the scorer, colour, shape and background are kept, and the asked motion
followed. 17 frames: the same with the first half of a video, whose second half is to be made.
Joins: a video of three clips of 34 frames; the change from frame to frame (mean over pixels) at the
joins over the median of all others, per video.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import RESULTS, markdown, write_json
from benchmarks.shapes import world
from benchmarks.shapes.contact_sheet import draw_row
from benchmarks.shapes.scorer import FIELDS, read_video
from mlx_sora import Pipeline
from mlx_sora.clips import Clips
from mlx_sora.video.writer import save_frames

LOOPS = Clips(num_frames=34, count=3)


@dataclass(frozen=True)
class Kept:
    """Share of videos. kept: colour, shape and background all as given; motion: as asked."""

    task: str
    frames: int
    cases: int
    colour: float
    shape: float
    background: float
    kept: float
    motion: float


@dataclass(frozen=True)
class Joins:
    """Change at the joins over the median change elsewhere: median and largest of the videos."""

    cases: int
    median: float
    largest: float


def spread(count: int) -> list[world.Attributes]:
    """`count` of the held-out combinations, spread over the list."""
    truths = world.split()[1]
    return [truths[i * len(truths) // count] for i in range(count)]


def drawn(truth: world.Attributes, case: int, frames: int) -> np.ndarray:
    """A video of the world, the same for a case whenever it is asked for."""
    path = world.random_path(truth.motion, np.random.default_rng((31, case)))
    return world.render(truth, path, np.linspace(0, 1, frames))


def measure(pipe: Pipeline, task: str, frames: int, count: int, rows: list[Image.Image]) -> Kept:
    """Score `count` videos of one task; adds a picture of every sixth to `rows`."""
    hits = []
    with tempfile.TemporaryDirectory() as folder:
        for case, truth in enumerate(spread(count)):
            real, prompt = drawn(truth, case, frames), world.caption(truth)
            if task == "first frame":
                given = Path(folder) / "first.png"
                Image.fromarray(real[0]).save(given)
                options: dict[str, object] = {"images": given}
            else:
                given = save_frames(Path(folder) / "before.mp4", real[:17], 24, overwrite=True)
                options = {"videos": given}
            made = pipe(prompt, seed=case, num_frames=frames, **options).frames
            assert made is not None
            reading = read_video(made)
            hits.append([getattr(reading, name) == getattr(truth, name) for name in FIELDS])
            if case % 6 == 0:
                rows.append(draw_row(f"{task}, {frames}: {prompt}", made))
            print(f"{task}, {frames} frames: {case + 1} of {count}", flush=True)
    shares = dict(zip(FIELDS, np.mean(hits, axis=0).tolist(), strict=True))
    kept = [
        all(hit for name, hit in zip(FIELDS, row, strict=True) if name != "motion") for row in hits
    ]
    return Kept(task, frames, count, kept=float(np.mean(kept)), **shares)


def join_ratio(frames: np.ndarray, clips: Clips) -> float:
    """Largest change at a join over the median of the others."""
    changes = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    step = clips.num_frames - clips.shared
    joins = [clips.num_frames - 1 + i * step for i in range(clips.count - 1)]
    others = np.delete(changes, joins)
    return float(changes[joins].max() / np.median(others))


def measure_joins(pipe: Pipeline, count: int, rows: list[Image.Image]) -> Joins:
    """Ratios over `count` long videos."""
    ratios = []
    for case, truth in enumerate(spread(count)):
        prompt = world.caption(truth)
        made = pipe(prompt, seed=case, num_frames=LOOPS.num_frames, loop=LOOPS.count).frames
        assert made is not None
        ratios.append(join_ratio(made, LOOPS))
        if case % 3 == 0:
            rows.append(draw_row(f"loop {LOOPS.count}: {prompt}", made))
        print(f"loop: {case + 1} of {count}, {ratios[-1]:.2f}", flush=True)
    return Joins(count, statistics.median(ratios), max(ratios))


def show(kept: list[Kept], joins: Joins) -> str:
    """Both tables."""
    headings = ["given", "frames", "kept", "motion", "colour", "shape", "background"]
    cells = [
        [
            row.task,
            str(row.frames),
            *(
                f"{value:.0%}"
                for value in (row.kept, row.motion, row.colour, row.shape, row.background)
            ),
        ]
        for row in kept
    ]
    return (
        markdown(headings, cells)
        + f"\n\njoins of {joins.cases} long videos: median {joins.median:.2f}×, "
        + f"largest {joins.largest:.2f}× the median change"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--loops", type=int, default=12, help="long videos")
    parser.add_argument("--json", type=Path, default=RESULTS / "conditioning.json")
    parser.add_argument("--sheet", type=Path, help="also draw some of the videos")
    asked = parser.parse_args()
    pipe, rows = Pipeline.from_pretrained(asked.model), list[Image.Image]()
    kept = [
        measure(pipe, "first frame", world.CHUNK, asked.cases, rows),
        measure(pipe, "17 frames", 2 * world.CHUNK, asked.cases, rows),
    ]
    joins = measure_joins(pipe, asked.loops, rows)
    print(show(kept, joins))
    values = {"kept": [asdict(row) for row in kept], "joins": asdict(joins)}
    write_json(asked.json, {"model": asked.model, **values})
    if asked.sheet:
        width, height = rows[0].size
        sheet = Image.new("RGB", (width, height * len(rows)), "white")
        for index, row in enumerate(rows):
            sheet.paste(row, (0, index * height))
        sheet.save(asked.sheet)


if __name__ == "__main__":
    main()
