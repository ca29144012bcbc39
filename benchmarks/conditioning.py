"""What is kept of a given first frame, and whether a long video shows where its clips join.

    python -m benchmarks.conditioning [--cases 48] [--loops 6] [--json FILE] [--sheet FILE]

First frame: the world draws the first frame of held-out videos, the bundled model continues it
under their captions; by the scorer, colour, shape and background are kept, and the asked motion
followed. 17 frames: the same with the first half of a video, whose second half is to be made.
The first frame also in clips of 34 and 51 frames, a quarter as many.
Joins: a video of three clips of 34 frames; the change from frame to frame (mean over pixels) at the
joins over the median of all others, per video; beside it the same for the place inside the first
clip where two chunks of the VAE meet, which is there without any join. Videos that stand still and
such that move apart: where nothing moves, what is usual is small.
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
from mlx_sora.conditioning.clips import Clips
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
    """Median over videos of the change at joins, and at the chunks' meeting inside a clip.

    Both over the median change from frame to frame elsewhere in the video, which is `usual`, in
    grey levels of 255.
    """

    videos: str
    cases: int
    joins: float
    chunks: float
    usual: float


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


def join_ratios(frames: np.ndarray, clips: Clips) -> tuple[float, float, float]:
    """Largest change at a join and that between the first clip's chunks, over the usual; that."""
    changes = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    step = clips.num_frames - clips.shared_frames
    joins = [clips.num_frames - 1 + i * step for i in range(clips.count - 1)]
    usual = float(np.median(np.delete(changes, joins)))
    return float(changes[joins].max()) / usual, float(changes[world.CHUNK - 1]) / usual, usual


def measure_joins(pipe: Pipeline, still: bool, count: int, rows: list[Image.Image]) -> Joins:
    """Ratios over `count` long videos that stand still, or that move."""
    held_out = [a for a in world.split()[1] if (a.motion == "still") == still]
    ratios = []
    for case in range(count):
        prompt = world.caption(held_out[case * len(held_out) // count])
        made = pipe(prompt, seed=case, num_frames=LOOPS.num_frames, loop=LOOPS.count).frames
        assert made is not None
        ratios.append(join_ratios(made, LOOPS))
        if case % 3 == 0:
            rows.append(draw_row(f"loop {LOOPS.count}: {prompt}", made))
        print(f"loop: {case + 1} of {count}, {ratios[-1][0]:.2f}", flush=True)
    medians = [statistics.median(values) for values in zip(*ratios, strict=True)]
    return Joins("still" if still else "moving", count, *medians)


def show(kept: list[Kept], joins: list[Joins]) -> str:
    """Both tables."""
    first = markdown(
        ["given", "frames", "kept", "motion", "colour", "shape", "background"],
        [
            [row.task, str(row.frames)]
            + [
                f"{value:.0%}"
                for value in (row.kept, row.motion, row.colour, row.shape, row.background)
            ]
            for row in kept
        ],
    )
    second = markdown(
        ["long videos", "at joins", "between chunks", "usual change"],
        [
            [row.videos, f"{row.joins:.1f}×", f"{row.chunks:.1f}×", f"{row.usual:.2f} of 255"]
            for row in joins
        ],
    )
    return f"{first}\n\n{second}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--loops", type=int, default=6, help="long videos of each sort")
    parser.add_argument("--json", type=Path, default=RESULTS / "conditioning.json")
    parser.add_argument("--sheet", type=Path, help="also draw some of the videos")
    asked = parser.parse_args()
    pipe, rows = Pipeline.from_pretrained(asked.model), list[Image.Image]()
    kept = [
        measure(pipe, "first frame", world.CHUNK, asked.cases, rows),
        measure(pipe, "first frame", 2 * world.CHUNK, max(1, asked.cases // 4), rows),
        measure(pipe, "first frame", 3 * world.CHUNK, max(1, asked.cases // 4), rows),
        measure(pipe, "17 frames", 2 * world.CHUNK, asked.cases, rows),
    ]
    joins = [measure_joins(pipe, still, asked.loops, rows) for still in (True, False)]
    print(show(kept, joins))
    values = {"kept": [asdict(row) for row in kept], "joins": [asdict(row) for row in joins]}
    write_json(asked.json, {"model": asked.model, **values})
    if asked.sheet:
        width, height = rows[0].size
        sheet = Image.new("RGB", (width, height * len(rows)), "white")
        for index, row in enumerate(rows):
            sheet.paste(row, (0, index * height))
        sheet.save(asked.sheet)


if __name__ == "__main__":
    main()
