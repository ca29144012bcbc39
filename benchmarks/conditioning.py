"""What is kept of a given first frame, and whether a long video shows where its clips join.

    python -m benchmarks.conditioning [--cases 48] [--loops 6] [--json FILE] [--sheet FILE]

First frame: the world draws the first frame of held-out videos, the bundled model continues it
under their captions; by the scorer, colour, shape and background are kept, and the asked motion
followed. 17 frames: the same with the first half of a video, whose second half is to be made.
The first frame also in clips of 34 and 51 frames, and all with each --image-guidance, a quarter as
many. A row that the file already has is not measured again.
Joins: a video of three clips of 34 frames, one after another or in windows; the change from frame
to frame (mean over pixels) at the joins over the median of all others, per video; beside it that
for the place inside the first clip where two chunks of the VAE meet, which is there without any
join. Videos that stand still and such that move apart: where nothing moves, what is usual is small.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import RESULTS, markdown, write_json
from benchmarks.shapes import world
from benchmarks.shapes.contact_sheet import draw_row
from benchmarks.shapes.scorer import FIELDS, read_video
from mlx_sora import Pipeline
from mlx_sora.conditioning.clips import Clips
from mlx_sora.request.generation import IMAGE_GUIDANCE, LONG_MODES
from mlx_sora.video.writer import save_frames

LOOPS = Clips(num_frames=34, count=3)

#: Task, image guidance, frames and number of videos of a row.
Work = tuple[str, str, int, int]


@dataclass(frozen=True)
class Kept:
    """Share of videos. kept: colour, shape and background all as given; motion: as asked.

    image_guidance: how denoising sees the given frames.
    """

    task: str
    image_guidance: str
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
    grey levels of 255. long: how the clips were made. right: share of videos as the prompt says.
    These are None in older rows.
    """

    videos: str
    cases: int
    joins: float
    chunks: float
    usual: float | None = None
    right: float | None = None
    long: str = "clips"


def spread(count: int) -> list[world.Attributes]:
    """`count` of the held-out combinations, spread over the list."""
    truths = world.split()[1]
    return [truths[i * len(truths) // count] for i in range(count)]


def drawn(truth: world.Attributes, case: int, frames: int) -> np.ndarray:
    """A video of the world, the same for a case whenever it is asked for."""
    path = world.random_path(truth.motion, np.random.default_rng((31, case)))
    return world.render(truth, path, np.linspace(0, 1, frames))


def measure(pipe: Pipeline, work: Work, rows: list[Image.Image]) -> Kept:
    """Score the videos of one row; adds a picture of every sixth to `rows`."""
    task, mode, frames, count = work
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
            options |= {"seed": case, "num_frames": frames, "image_guidance": mode}
            made = pipe(prompt, **options).frames
            assert made is not None
            reading = read_video(made)
            hits.append([getattr(reading, name) == getattr(truth, name) for name in FIELDS])
            if case % 6 == 0:
                rows.append(draw_row(f"{task}, {mode}, {frames}: {prompt}", made))
            print(f"{task}, {mode}, {frames} frames: {case + 1} of {count}", flush=True)
    shares = dict(zip(FIELDS, np.mean(hits, axis=0).tolist(), strict=True))
    kept = [
        all(hit for name, hit in zip(FIELDS, row, strict=True) if name != "motion") for row in hits
    ]
    return Kept(*work, kept=float(np.mean(kept)), **shares)


def join_ratios(frames: np.ndarray, clips: Clips) -> tuple[float, float, float]:
    """Largest change at a join and that between the first clip's chunks, over the usual; that."""
    changes = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    step = clips.num_frames - clips.shared_frames
    joins = [clips.num_frames - 1 + i * step for i in range(clips.count - 1)]
    usual = float(np.median(np.delete(changes, joins)))
    return float(changes[joins].max()) / usual, float(changes[world.CHUNK - 1]) / usual, usual


def measure_joins(
    pipe: Pipeline, long: str, still: bool, count: int, rows: list[Image.Image]
) -> Joins:
    """Ratios over `count` long videos that stand still, or that move."""
    held_out = [a for a in world.split()[1] if (a.motion == "still") == still]
    ratios, right = [], 0
    for case in range(count):
        truth = held_out[case * len(held_out) // count]
        prompt, frames = world.caption(truth), LOOPS.num_frames
        made = pipe(prompt, seed=case, num_frames=frames, loop=LOOPS.count, long=long).frames
        assert made is not None
        reading = read_video(made)
        right += all(getattr(reading, name) == getattr(truth, name) for name in FIELDS)
        ratios.append(join_ratios(made, LOOPS))
        if case % 3 == 0:
            rows.append(draw_row(f"loop {LOOPS.count}, {long}: {prompt}", made))
        print(f"{long}: {case + 1} of {count}, {ratios[-1][0]:.2f}", flush=True)
    medians = [statistics.median(values) for values in zip(*ratios, strict=True)]
    return Joins("still" if still else "moving", count, *medians, right / count, long)


def show(kept: list[Kept], joins: list[Joins]) -> str:
    """Both tables."""
    first = markdown(
        ["given", "seen", "frames", "kept", "motion", "colour", "shape", "background"],
        [
            [row.task, row.image_guidance, str(row.frames)]
            + [
                f"{value:.0%}"
                for value in (row.kept, row.motion, row.colour, row.shape, row.background)
            ]
            for row in kept
        ],
    )
    second = markdown(
        ["long videos", "made of", "at joins", "between chunks", "usual change", "right"],
        [
            [
                row.videos,
                row.long,
                f"{row.joins:.1f}×",
                f"{row.chunks:.1f}×",
                "" if row.usual is None else f"{row.usual:.2f} of 255",
                "" if row.right is None else f"{row.right:.0%}",
            ]
            for row in joins
        ],
    )
    return f"{first}\n\n{second}"


def works(cases: int) -> list[Work]:
    """All rows; `cases` videos where frames are seen clean and measured at their best length."""
    few = max(1, cases // 4)
    found = [("first frame", "clean", world.CHUNK, cases), ("17 frames", "clean", 34, cases)]
    found += [("first frame", "clean", frames, few) for frames in (34, 51)]
    for mode in IMAGE_GUIDANCE[1:]:
        found += [("first frame", mode, frames, few) for frames in (17, 34, 51)]
        found.append(("17 frames", mode, 34, few))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--loops", type=int, default=6, help="long videos of each sort")
    parser.add_argument("--json", type=Path, default=RESULTS / "conditioning.json")
    parser.add_argument("--sheet", type=Path, help="also draw some of the videos")
    asked = parser.parse_args()
    pipe, rows = Pipeline.from_pretrained(asked.model), list[Image.Image]()
    found = json.loads(asked.json.read_text()) if asked.json.exists() else {}
    kept = [Kept(**row) for row in found.get("kept", [])]
    joins = [Joins(**row) for row in found.get("joins", [])]

    def write() -> None:
        values = {"kept": [asdict(row) for row in kept], "joins": [asdict(row) for row in joins]}
        write_json(asked.json, {"model": asked.model, **values})

    for work in works(asked.cases):
        if work[:3] not in [(row.task, row.image_guidance, row.frames) for row in kept]:
            kept.append(measure(pipe, work, rows))
            write()
    for long, sort in product(LONG_MODES, ("still", "moving")):
        if (sort, long) not in [(row.videos, row.long) for row in joins]:
            joins.append(measure_joins(pipe, long, sort == "still", asked.loops, rows))
            write()
    print(show(kept, joins))
    if asked.sheet and rows:
        width, height = rows[0].size
        sheet = Image.new("RGB", (width, height * len(rows)), "white")
        for index, row in enumerate(rows):
            sheet.paste(row, (0, index * height))
        sheet.save(asked.sheet)


if __name__ == "__main__":
    main()
