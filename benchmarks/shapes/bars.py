"""Scores a shapes model on all rows by which an edition is judged.

    python -m benchmarks.shapes.bars --model FOLDER --out FOLDER [--rows NAME ...] [--cases N]
    python -m benchmarks.shapes.bars --show OLD NEW

Every video is one line of a file under --out, so that a run that was stopped goes on. Rows: what
held-out prompts show at 17 to 68 frames and in images; given first frames at the same lengths, seen
clean and noised; 68 frames made of three clips of 34, one after another or as windows; the VAE's
PSNR. From the same videos: how round circles are, in their first frame too, and the change where
two chunks of the VAE meet over the usual change from frame to frame, and so where two clips or
windows do. The VAE's rows have both as well, of drawn videos: what it alone changes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import markdown
from benchmarks.conditioning import drawn, spread
from benchmarks.shapes import world
from benchmarks.shapes.scorer import FIELDS, read_video, shape_masks
from mlx_sora import Pipeline
from mlx_sora.conditioning.clips import Clips
from mlx_sora.request.generation import LONG_MODES

LENGTHS = (17, 34, 51, 68)
CASES, KEPT_CASES, VAE_CASES, LONG_CASES = 96, 24, 48, 96
# Three of them have 68 frames; clips end, and windows are mixed, where the second and third begin.
LONG = Clips(num_frames=34, count=3)
# Half way between squares, which overlap with their disc by 0.85 at most, and drawn circles, 0.98.
ROUND = 0.92
Line = dict[str, Any]


def overlap_with_disc(mask: np.ndarray) -> float:
    """Pixels that a mask [H, W] shares with the disc of its centre and area, over those of both."""
    area = mask.sum()
    if not area:
        return 0.0
    rows, columns = np.nonzero(mask)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    distance = (y - rows.mean()) ** 2 + (x - columns.mean()) ** 2
    disc = distance <= area / np.pi
    return float((mask & disc).sum() / (mask | disc).sum())


def meeting_ratio(frames: np.ndarray) -> tuple[float, float]:
    """(mean change where chunks meet over the usual one, that in grey levels of 255)."""
    changes = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    meetings = np.arange(world.CHUNK - 1, len(changes), world.CHUNK)
    usual = float(np.median(np.delete(changes, meetings)))
    return float(changes[meetings].mean()) / max(usual, 1e-9), usual


def join_change(frames: np.ndarray) -> tuple[float, float]:
    """(mean change where clips meet, the usual change), in grey levels of 255."""
    changes = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    step = LONG.num_frames - LONG.shared_frames
    joins = [LONG.num_frames - 1 + i * step for i in range(LONG.count - 1)]
    return float(changes[joins].mean()), float(np.median(np.delete(changes, joins)))


def long_truth(case: int) -> world.Attributes:
    """A held-out combination: of each two, the second stands still."""
    some = [a for a in world.split()[1] if (a.motion == "still") == bool(case % 2)]
    return some[case // 2 * len(some) // (LONG_CASES // 2)]


def psnr(made: np.ndarray, real: np.ndarray) -> float:
    """PSNR in dB of uint8 frames."""
    error = float(((made.astype(float) - real) ** 2).mean())
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def describe(made: np.ndarray, truth: world.Attributes) -> Line:
    """What is kept of one generated video."""
    reading = read_video(made)
    line: Line = {name: getattr(reading, name) == getattr(truth, name) for name in FIELDS}
    return line | describe_frames(made, truth)


def describe_frames(made: np.ndarray, truth: world.Attributes) -> Line:
    """How round a circle is, and how much changes where chunks meet."""
    line: Line = {}
    if truth.shape == "circle":
        overlaps = [overlap_with_disc(mask) for mask in shape_masks(made)]
        line |= {"first": overlaps[0], "round": float(np.mean(overlaps))}
    if len(made) > world.CHUNK:
        line["meeting"], line["usual"] = meeting_ratio(made)
        line["still"] = truth.motion == "still"
    return line


@dataclass(frozen=True)
class Scored:
    """One model whose videos are made one after another."""

    model: str

    @cached_property
    def pipe(self) -> Pipeline:
        return Pipeline.from_pretrained(self.model)

    @cached_property
    def vae(self) -> Any:
        from mlx_sora.loading.networks import load_vae

        return load_vae(self.pipe.model, ("encoder", "decoder"))

    def prompt(self, frames: int, case: int) -> Line:
        """A held-out prompt."""
        truth = world.split()[1][case]
        return describe(self._make(truth, case, frames), truth)

    def long(self, mode: str, case: int) -> Line:
        """A long video of clips or windows."""
        truth = long_truth(case)
        made = self._make(truth, case, LONG.num_frames, loop=LONG.count, long=mode)
        joins, usual = join_change(made)
        return describe(made, truth) | {"joins": joins, "usual": usual}

    def given(self, mode: str, frames: int, case: int) -> Line:
        """A held-out prompt with the first frame of a drawn video; `spread` over the prompts.

        mode: of --image-guidance.
        """
        truth = spread(KEPT_CASES)[case]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "first.png"
            Image.fromarray(drawn(truth, case, frames)[0]).save(path)
            made = self._make(truth, case, frames, images=path, image_guidance=mode)
            return describe(made, truth)

    def rebuilt(self, frames: int, case: int) -> Line:
        """A drawn video, encoded and decoded."""
        import mlx.core as mx

        from mlx_sora.video.frames import to_uint8

        truth = spread(VAE_CASES)[case]
        real = drawn(truth, case, max(frames, world.CHUNK))[:: world.CHUNK if frames == 1 else 1]
        real = real[:frames]
        z = self.vae.encode(mx.array(real)[None].astype(mx.float32) / 127.5 - 1)
        made = np.array(to_uint8(self.vae.decode(z, frames)[0]))
        return {"psnr": psnr(made, real)} | describe_frames(made, truth)

    def _make(self, truth: world.Attributes, seed: int, frames: int, **options: Any) -> np.ndarray:
        prompt = world.caption(truth)
        made = self.pipe(prompt, seed=seed, num_frames=frames, **options).frames
        assert made is not None
        return np.asarray(made)


Work = Callable[[Scored, int], Line]

#: Rows with a given first frame, and how denoising sees it.
GIVEN = {"given": "clean", "noised": "noised"}


def works() -> dict[str, tuple[int, Work]]:
    """Row name -> cases and what one of them does."""
    rows: dict[str, tuple[int, Work]] = {}
    for frames in (1, *LENGTHS):
        rows[f"vae-{frames}"] = VAE_CASES, lambda s, case, f=frames: s.rebuilt(f, case)
    for frames in (1, *LENGTHS):
        rows[f"prompt-{frames}"] = CASES, lambda s, case, f=frames: s.prompt(f, case)
    for kind, mode in GIVEN.items():
        for frames in LENGTHS:
            name = f"{kind}-{frames}"
            rows[name] = KEPT_CASES, lambda s, case, m=mode, f=frames: s.given(m, f, case)
    for mode in LONG_MODES:
        rows[f"{mode}-68"] = LONG_CASES, lambda s, case, m=mode: s.long(m, case)
    return rows


def read_lines(folder: Path, name: str) -> list[Line]:
    """The cases that were made."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(scored: Scored, folder: Path, names: Sequence[str], most: int | None) -> None:
    """Make what is missing of the rows, at most that many cases of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        count, work = works()[name]
        for case in range(len(read_lines(folder, name)), min(count, most or count)):
            line = work(scored, case)
            with (folder / f"{name}.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            print(f"{name}: {case + 1} of {count}", flush=True)


@dataclass(frozen=True)
class Figure:
    """One row of the table: its value, from how many videos, and the bar; `least` or at most."""

    name: str
    value: float
    cases: int
    bar: float
    least: bool = True
    unit: str = "%"

    @property
    def met(self) -> bool:
        return self.value >= self.bar if self.least else self.value <= self.bar

    @property
    def cell(self) -> str:
        """Value and number of videos; an exclamation mark where the bar is missed."""
        return f"{self.show(self.value)} of {self.cases}{'' if self.met else ' !'}"

    def show(self, value: float) -> str:
        return f"{value:.1%}" if self.unit == "%" else f"{value:.2f}{self.unit}"


def _share(name: str, bar: float, hits: Sequence[bool]) -> Figure:
    return Figure(name, float(np.mean(hits)), len(hits), bar)


def figures(folder: Path) -> Iterator[Figure]:
    """The table of what was made so far, rows without videos left out."""
    lines = {name: read_lines(folder, name) for name in works()}
    for name, rows in lines.items():
        kind, frames = name.split("-")
        if not rows:
            continue
        if kind == "vae":
            value = statistics.fmean(row["psnr"] for row in rows)
            yield Figure(f"VAE, {frames} frames", value, len(rows), 30.0, unit=" dB")
        elif kind == "prompt":
            fields = [field for field in FIELDS if frames != "1" or field != "motion"]
            hits = [all(row[field] for field in fields) for row in rows]
            yield _share(f"all right, {frames} frames", 0.9 if frames == "1" else 0.95, hits)
        elif kind in LONG_MODES:
            yield _share(f"all right, 68 frames of {kind}", 0.9, [_all_right(row) for row in rows])
            yield from _joins(kind, rows)
        else:
            hits = [row["colour"] and row["shape"] and row["background"] for row in rows]
            seen = f"{frames} frames" + ("" if kind == "given" else f", {GIVEN[kind]}")
            yield _share(f"first frame kept, {seen}", 0.9, hits)
            yield _share(f"motion followed, {seen}", 0.9, [row["motion"] for row in rows])
    for kind, first_words in (("prompt", ""), ("vae", "VAE alone, ")):
        made = [row for n in LENGTHS for row in lines.get(f"{kind}-{n}", [])]
        yield from _roundness(first_words, made)
        yield from _meetings(first_words, made)


def _all_right(row: Line) -> bool:
    return all(row[field] for field in FIELDS)


def _joins(kind: str, rows: list[Line]) -> Iterator[Figure]:
    moving, still = ([row for row in rows if row["still"] == each] for each in (False, True))
    name = f"change where {kind} meet"
    if moving:
        value = statistics.median(row["joins"] / max(row["usual"], 1e-9) for row in moving)
        yield Figure(f"{name}, moving", value, len(moving), 1.5, least=False, unit="×")
    if still:
        value = statistics.median(row["joins"] - row["usual"] for row in still)
        name = f"{name} beyond the usual, still"
        yield Figure(name, value, len(still), 1.0, least=False, unit=" of 255")


def _roundness(first_words: str, rows: list[Line]) -> Iterator[Figure]:
    circles, name = [row for row in rows if "round" in row], f"{first_words}circles round"
    if circles:
        yield _share(f"{name} in the first frame", 0.95, [c["first"] >= ROUND for c in circles])
        yield _share(f"{name} on average", 0.95, [c["round"] >= ROUND for c in circles])


def _meetings(first_words: str, rows: list[Line]) -> Iterator[Figure]:
    for still in (False, True):
        some = [row for row in rows if row.get("still") == still]
        if some:
            value = statistics.median(row["meeting"] for row in some)
            name = f"{first_words}change where chunks meet, {'still' if still else 'moving'}"
            yield Figure(name, value, len(some), 1.2, least=False, unit="×")


def show(folders: Sequence[Path]) -> str:
    """One table of several models, the bar last."""
    tables = [{figure.name: figure for figure in figures(folder)} for folder in folders]
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = []
    for name in names:
        some = [table.get(name) for table in tables]
        known = next(figure for figure in some if figure)
        cells = [
            f"{f.show(f.value)} of {f.cases}{'' if f.met else ' !'}" if f else "" for f in some
        ]
        bar = f"{'≥' if known.least else '≤'} {known.show(known.bar)}"
        rows.append([name, *cells, bar])
    return markdown(["", *(folder.name for folder in folders), "bar"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="shapes", help="name or folder")
    parser.add_argument("--out", type=Path, help="folder for the figures, resumable")
    parser.add_argument("--rows", nargs="+", choices=list(works()), help="default: all")
    parser.add_argument("--cases", type=int, help="score at most N cases of each row")
    parser.add_argument("--show", nargs="+", type=Path, help="only print figures made before")
    options = parser.parse_args()
    if options.show:
        print(show(options.show))
        return
    if options.out is None:
        parser.error("--out is needed to score a model")
    run(Scored(options.model), options.out, options.rows or list(works()), options.cases)
    print(show([options.out]))


if __name__ == "__main__":
    main()
