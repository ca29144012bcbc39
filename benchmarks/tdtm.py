"""What token merging costs in quality, by site, and what it saves at the published width.

    python -m benchmarks.tdtm [--prompts 12] [--only WORD] [--json FILE]
    python -m benchmarks.tdtm --speeds [--runs 2]

Runs the bundled model on held-out prompts, one seed each, with and without merging. PSNR compares
with the video without; motion is the mean change from frame to frame, as a share of its; adherence
is the share of videos that show all that was asked. Speeds are those of the steps of the published
model by operations: the four blocks of the bundled one stand for quarters of 28. Calibrated rows
use a table that was measured on `CALIBRATION` other prompts for that width. --speeds times a step
of one random block pair of that width instead, in processor seconds, all sites in turn. A row that
the file has for as many prompts is not made again; nor is the table in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip

from benchmarks.common import RESULTS, markdown, scored_parser, write_json
from benchmarks.full_model import random_transformer
from benchmarks.ondevice import psnr
from benchmarks.shapes import world
from benchmarks.shapes.scorer import read_video, score
from benchmarks.streaming import Passes, Shape
from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.accel.merging_table import MergingTable, Part
from mlx_sora.accel.tdtm import MergedSites, PairedFrames
from mlx_sora.loading.networks import load_transformer
from mlx_sora.memory.flops import Grid, transformer_flops
from mlx_sora.models.hooks import TokenMerging
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.pipeline.calibrate import requests_for
from mlx_sora.pipeline.calibrate_merging import Savings, choose, measure, merging_parts
from mlx_sora.pipeline.generate import prepare
from mlx_sora.request.techniques import SITES
from mlx_sora.video.similarity import motion

STEPS, CALIBRATION, MOST = 30, 6, 1.3

#: Grids of the published model: 240p, 51 frames and a prompt of 40 tokens, and that of On-device
#: Sora: 256x256, 68 frames, and text padded to 300 tokens.
GRIDS = {"240p": Grid(2, 15, 405, 40), "paper": Grid(2, 20, 256, 300)}
FULL = STDiT3Config()

#: Latents and pixels of the first of them, whose steps are timed.
TIMED: Shape = (15, 30, 53), (240, 426)

PAPER = ("15", "all", "last:15")
SINGLE = tuple(f"{when}sites={site}" for site in SITES[::-1] for when in ("last:15,", "all:"))
MIXED = ("last:15,sites=cross+temporal-kv", "all:sites=cross,blocks=0-1")
SPEEDS = (1.09, 1.2, 1.15, 1.05, 1.25)
CACHES = ("every:4,order=1", "table:8")

#: Where the table of calibrated rows is for one run.
TABLE = "table"


@dataclass(frozen=True)
class Row:
    """A row of the table. psnr: dB over all frames together.

    speeds: of the steps at the published width, by grid. motion: share of the change from frame to
    frame that remains. adherence: share of videos by attribute, and of those right in all.
    """

    row: str
    options: dict[str, str]
    prompts: int
    speeds: dict[str, float]
    psnr: float | None
    motion: float
    adherence: dict[str, float]


def rows() -> dict[str, dict[str, str]]:
    """Row → options of the request; "table" stands for the file of the calibrated table."""
    merging = [*PAPER, *(f"table:{speed}" for speed in SPEEDS), *SINGLE, *MIXED]
    found = {f"tdtm {mode}": {"tdtm": mode} for mode in merging}
    for cache in CACHES:
        found[f"step_cache {cache}"] = {"step_cache": cache}
        for mode in ("table:1.09", "table:1.2"):
            found[f"tdtm {mode} + step_cache {cache}"] = {"tdtm": mode, "step_cache": cache}
    return {"exact": {}, **found}


class Bench:
    """Videos of one model."""

    def __init__(self, options: argparse.Namespace, table: Path) -> None:
        self._options, self._table = options, table
        self._pipe = Pipeline.from_pretrained(options.model)
        self._truths = world.split()[1][: options.prompts]

    def request(self, number: int, options: dict[str, str]) -> GenerationRequest:
        """The request of a row for one prompt."""
        own = dict(options)
        if own.get("tdtm", "").startswith("table:"):
            own["tdtm"] += f",file={self._table}"
        common = {"prompt": world.caption(self._truths[number]), "seed": number, "steps": STEPS}
        return GenerationRequest.from_dict({**common, "num_frames": world.CHUNK, **own})

    def make(self, options: dict[str, str]) -> list[np.ndarray]:
        """The videos of a row."""
        made = []
        for number in range(len(self._truths)):
            frames = self._pipe(self.request(number, options)).frames
            assert frames is not None
            made.append(frames)
        return made

    @cached_property
    def exact(self) -> list[np.ndarray]:
        return self.make({})

    def speeds(self, options: dict[str, str]) -> dict[str, float]:
        """Speeds of the steps at the published width, by grid."""
        parts = self._pipe.prepare(self.request(0, options)).accelerations
        depth = int(self._pipe.model.config("transformer")["depth"])
        speeds = {}
        for name, grid in GRIDS.items():
            work = 0
            for step in range(STEPS):
                sites = parts.merged_sites(step)
                wide = [sites[n * depth // FULL.depth] for n in range(FULL.depth)] if sites else []
                config = replace(FULL, depth=0) if step in parts.skipped_steps else FULL
                work += transformer_flops(config, grid, wide)
            speeds[name] = STEPS * transformer_flops(FULL, grid) / work
        return speeds

    def row(self, name: str, options: dict[str, str]) -> Row:
        """Measure a row."""
        made = self.make(options) if options else self.exact
        pairs = list(zip(made, self.exact, strict=True))
        errors = [float(np.mean((a.astype(float) - b) ** 2)) for a, b in pairs]
        moved, usual = (statistics.mean(map(motion, videos)) for videos in (made, self.exact))
        return Row(
            row=name,
            options=options,
            prompts=len(made),
            speeds=self.speeds(options),
            psnr=psnr(statistics.mean(errors)),
            motion=moved / usual,
            adherence=score([read_video(frames) for frames in made], self._truths),
        )


def calibrate(model: str, speed: float) -> tuple[MergingTable, dict[str, Any]]:
    """The table for the published width, and how errors of parts add up."""
    pipe = Pipeline.from_pretrained(model)
    captions = [world.caption(truth) for truth in world.split()[0][:: len(world.split()[0]) // 6]]
    options = {"steps": STEPS, "num_frames": world.CHUNK}
    runs = [
        prepare(pipe.engine, request) for request in requests_for(captions[:CALIBRATION], options)
    ]
    depth, size = pipe.engine.transformer_config.depth, runs[0].settings.geometry.size
    parts = merging_parts(depth, STEPS)
    total = mx.zeros((len(parts), len(parts)))
    for run in runs:
        total = total + measure(run, parts) / len(runs)
        print("one prompt calibrated", flush=True)
    products: Any = total.tolist()
    full = Savings.of(FULL, GRIDS["240p"])
    saved = {site: own * FULL.depth / depth for site, own in full.saved.items()}
    found = tuple(choose(parts, products, Savings(full.step, saved), STEPS, speed))
    key = (pipe.model.name, depth, STEPS, size.width, size.height, world.CHUNK)
    return MergingTable(*key, parts=found), {"sums": sums(parts, np.array(products))}


def sums(parts: list[Part], products: np.ndarray) -> list[dict[str, Any]]:
    """Squared error of sets of sites in all blocks and steps, over the sum of the sites' own.

    steps: that of a site in all steps over the sum of its steps' own; 1 is additive.
    """

    def error(*sites: str, step: object = None) -> float:
        own = [part.site in sites and step in (None, part.steps) for part in parts]
        return float(products[np.ix_(own, own)].sum())

    groups = dict.fromkeys(part.steps for part in parts)
    pairs = [(a, b) for n, a in enumerate(SITES) for b in SITES[n + 1 :] if f"{a}-kv" != b]
    found: list[dict[str, Any]] = [
        {"sites": [a, b], "ratio": error(a, b) / (error(a) + error(b))} for a, b in pairs
    ]
    for site in SITES:
        alone = sum(error(site, step=group) for group in groups)
        found.append({"sites": [site], "steps": error(site) / alone})
    return found


def step_speeds(runs: int, table: MergingTable) -> dict[str, Any]:
    """Processor seconds of a step of one block pair at the published width, by site; speeds.

    It is unguided, which is half of a guided one. sets: of steps that merge by the table, by the
    seconds that each of their sites saves.
    """
    kinds: dict[str, TokenMerging | None] = {"exact": None, "paper": PairedFrames()}
    kinds |= {site: MergedSites((site,), range(1)) for site in SITES}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    with random_transformer(1) as model:
        network = load_transformer(model, mx.float32)
        works = {name: partial(Passes(network, TIMED, 1), None, own) for name, own in kinds.items()}
        works["exact"]()  # fills the page cache
        for name in [*kinds, *list(kinds)[::-1]] * runs:
            start = time.process_time()
            works[name]()
            times[name].append(time.process_time() - start)
            print(name, f"{times[name][-1]:.1f} s", flush=True)
    seconds = {name: statistics.median(own) for name, own in times.items()}
    exact = seconds["exact"]
    sets = {}
    for speed in sorted(SPEEDS):
        merged = [site for blocks in table.sites(speed).values() for own in blocks for site in own]
        saved = sum(exact - seconds[site] for site in merged) / (STEPS * table.blocks)
        sets[f"table:{speed}"] = exact / (exact - saved)
    return {
        "seconds": seconds,
        "speeds": {name: exact / own for name, own in seconds.items()},
        "sets": sets,
    }


def show(found: list[Row]) -> str:
    """The table."""
    headings = ["", *(f"speed, {name}" for name in GRIDS), "PSNR", "motion", "adherence"]
    lines = [
        [
            row.row,
            *(f"{row.speeds[name]:.3f}×" for name in GRIDS),
            "–" if row.psnr is None else f"{row.psnr:.1f} dB",
            f"{row.motion:.0%}",
            f"{row.adherence['all']:.0%}",
        ]
        for row in found
    ]
    return markdown(headings, lines)


def main() -> None:
    parser = scored_parser(__doc__ or "", 12, RESULTS / "tdtm.json")
    parser.add_argument("--only", default="", help="rows with one of these words, with commas")
    parser.add_argument("--speeds", action="store_true", help="time a step of the published width")
    parser.add_argument("--runs", type=int, default=2, help="of --speeds, twice each; default 2")
    options = parser.parse_args()
    result = json.loads(options.json.read_text()) if options.json.exists() else {"rows": []}
    if TABLE not in result:
        made, more = calibrate(options.model, MOST)
        result |= {TABLE: asdict(made), **more}
        write_json(options.json, result)
    content = dict(result[TABLE])
    parts = [Part(**part) for part in content.pop("parts")]
    table = MergingTable(**content, parts=parts)
    if options.speeds:
        write_json(options.json, {**result, "steps": step_speeds(options.runs, table)})
        return
    with tempfile.TemporaryDirectory() as folder:
        path = table.write(Path(folder, "table.json"))
        found = list(measured(options, result, path))
    print(show(found))


def measured(options: argparse.Namespace, result: dict[str, Any], table: Path) -> Iterator[Row]:
    """Every row of the file or made now; the file is written after each."""
    bench, words = Bench(options, table), options.only.split(",")
    known = {row["row"]: row for row in result["rows"]}
    for name, own in rows().items():
        old = known.get(name)
        if old is not None and old["prompts"] == options.prompts:
            yield Row(**old)
            continue
        if not any(word in name for word in words):
            continue
        row = bench.row(name, own)
        known[name] = asdict(row)
        result["rows"] = [known[each] for each in rows() if each in known]
        write_json(options.json, result)
        print(show([row]).splitlines()[-1], flush=True)
        yield row


if __name__ == "__main__":
    main()
