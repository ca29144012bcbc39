"""What LPL, TDTM and CI-DL save at the size and lengths of On-device Sora's paper.

    python -m benchmarks.ondevice_full [--runs 2] [--depth 2] [--json FILE]

256² and 192² × 68 frames × 30 steps, guided. Measured, with `--depth` random block pairs at full
width: processor seconds of an evaluation, whole and with merged frames, in turn; and how much of
the time to read a block CI-DL hides, in passes over a smaller video behind a disk as slow to this
machine as the iPhone's is to it (READ). Computed from these: the rows. An evaluation takes
28 / depth as long (embedders and final layer, below 1 % of it, are counted 28 / depth times); each
of its pairs is read anew, as in the paper, whose rows without CI-DL wait for every block. Quality
cannot be had from random weights; `benchmarks/ondevice.py` has it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip

from benchmarks.common import RESULTS, alternate, arguments, markdown, seconds, write_json
from benchmarks.full_model import random_transformer
from benchmarks.streaming import Passes, Shape, Throttled
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.accel.tdtm import PairedFrames
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_transformer, stream_transformer
from mlx_sora.memory.limits import release

SIZES: Mapping[str, Shape] = {
    "256²": ((20, 32, 32), (256, 256)),
    "192²": ((20, 24, 24), (192, 192)),
}
#: The video of the passes behind a disk: a few tenths of a second per pair.
SMALL: Shape = ((1, 32, 32), (256, 256))
STEPS, DEPTH, PASSES = 30, 28, 3

#: Time to read a block pair over the time to compute it, on the iPhone: a step's blocks took 29 s
#: one after the other, and 23 s with CI-DL.
READ = 29 / 23 - 1


@dataclass(frozen=True)
class Technique:
    """A row. leap: steps before the leap, merged: first steps that merge frames."""

    leap: int = STEPS
    merged: int = 0
    ahead: bool = False

    @property
    def evaluations(self) -> int:
        return min(STEPS, self.leap + 1)


ROWS = {
    "exact": Technique(),
    "LPL, after 15": Technique(leap=15),
    "LPL, after 17 (adaptive)": Technique(leap=17),
    "LPL, after 23": Technique(leap=23),
    "TDTM, first 10": Technique(merged=10),
    "TDTM, first 15": Technique(merged=15),
    "TDTM, first 20": Technique(merged=20),
    "TDTM, all": Technique(merged=STEPS),
    "CI-DL": Technique(ahead=True),
    "LPL, after 15 + TDTM, first 15": Technique(15, 15),
    "LPL, after 15 + TDTM, all": Technique(15, STEPS),
    "LPL, after 15 + CI-DL": Technique(15, ahead=True),
    "all three, TDTM first 15": Technique(15, 15, ahead=True),
    "all three, TDTM all": Technique(15, STEPS, ahead=True),
}

#: Seconds of the paper's Table 5 (STDiT on an iPhone 15 Pro). 256² exact is 30 of the steps of its
#: Table 1; 192² exact is not published: 30 / 16 of LPL.
PAPER = {
    "256²": {
        "exact": STEPS * 35.366,
        "LPL, after 15": 573.88,
        "TDTM, all": 965.40,
        "CI-DL": 947.67,
        "all three, TDTM all": 454.48,
    },
    "192²": {
        "exact": 390.72 * STEPS / 16,
        "LPL, after 15": 390.72,
        "TDTM, all": 696.03,
        "CI-DL": 566.81,
        "all three, TDTM all": 293.51,
    },
}


@dataclass(frozen=True)
class Measured:
    """Processor seconds of an evaluation at the measured depth, and MLX's peak in bytes."""

    whole: float
    merged: float
    whole_peak: int
    merged_peak: int


@dataclass(frozen=True)
class Stream:
    """Passes behind the slow disk: medians of wall seconds per pass.

    load: of the blocks while others compute; wait: of the pass for them. hidden: share of the
    loading that nothing waited for. speed: of passes ahead, against their time had they waited for
    all of it: on demand, without the noise of a busy machine between two passes.
    """

    compute: float
    on_demand: float
    ahead: float
    load: float
    wait: float
    hidden: float
    speed: float


@dataclass(frozen=True)
class Row:
    """A technique at one size, computed. resident: speed with all blocks in memory (no CI-DL).

    seconds: of the run, reading included. speed: against exact. paper: its speed, None without.
    """

    size: str
    row: str
    evaluations: int
    seconds: float
    resident: float | None
    speed: float
    paper: float | None


def processor_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def evaluate(model: ModelFolder, shape: Shape, runs: int) -> Measured:
    """Time evaluations with all frames and with merged ones, in turn."""
    passes = Passes(load_transformer(model, mx.float32), shape, 2)
    mx.eval(passes.network.parameters())
    works = [partial(passes, None, tokens) for tokens in (None, PairedFrames())]
    times, peaks = list[list[float]](), [0, 0]
    for _ in range(runs):
        times.append([])
        for number, work in enumerate(works):
            release()
            mx.reset_peak_memory()
            times[-1].append(processor_seconds(work))
            peaks[number] = max(peaks[number], mx.get_peak_memory())
    whole, merged = (statistics.median(column) for column in zip(*times, strict=True))
    return Measured(whole, merged, *peaks)


def stream(model: ModelFolder, runs: int) -> Stream:
    """Time passes over SMALL: all resident, on demand, and ahead."""
    with ExitStack() as stack:
        whole = Passes(load_transformer(model, mx.float32), SMALL, 2)
        whole()
        _, source = stream_transformer(model, mx.float32)
        rate = sum(source.nbytes) / (READ * min(seconds(whole) for _ in range(3)))
        works, streams = [partial(repeat, whole)], []
        for prefetch in (False, True):
            network, source = stream_transformer(model, mx.float32)
            source = replace(source, reader=Throttled(rate))
            blocks = stack.enter_context(BlockStream(source, cyclic=True, prefetch=prefetch))
            works.append(partial(repeat, partial(Passes(network, SMALL, 2), blocks)))
            streams.append(blocks)
            works[-1]()
        stats = streams[-1].stats
        loads, waits = stats.load_seconds, stats.wait_seconds
        times = alternate(runs, *works)
    load, wait = stats.load_seconds - loads, stats.wait_seconds - waits
    total = sum(ahead for *_, ahead in times)
    return Stream(
        *(statistics.median(column) / PASSES for column in zip(*times, strict=True)),
        load=load / PASSES / runs,
        wait=wait / PASSES / runs,
        hidden=1 - wait / load,
        speed=(total - wait + load) / total,
    )


def repeat(work: Callable[[], None]) -> None:
    for _ in range(PASSES):
        work()


def table(size: str, found: Measured, hidden: float) -> Iterator[Row]:
    """The rows of one size. hidden: share of the reading that CI-DL hides."""

    def total(row: Technique, read: float) -> float:
        wait = read * found.whole * (1 - (min(hidden, 1) if row.ahead else 0))
        merged = min(row.merged, row.evaluations)
        once = merged * found.merged + (row.evaluations - merged) * found.whole
        return (once + row.evaluations * wait) * DEPTH

    exact, paper = ROWS["exact"], PAPER[size]
    for name, row in ROWS.items():
        yield Row(
            size=size,
            row=name,
            evaluations=row.evaluations,
            seconds=total(row, READ),
            resident=None if row.ahead else total(exact, 0) / total(row, 0),
            speed=total(exact, READ) / total(row, READ),
            paper=paper["exact"] / paper[name] if name in paper else None,
        )


def show(rows: list[Row]) -> str:
    headings, cells = ["", "evaluations"], list[list[str]]()
    for size in SIZES:
        headings += [f"{size}: in memory", "from disk", "paper"]
    for name, technique in ROWS.items():
        line = [name, str(technique.evaluations)]
        for row in (row for row in rows if row.row == name):
            speeds = (row.resident, row.speed, row.paper)
            line += ["–" if speed is None else f"{speed:.2f}×" for speed in speeds]
        cells.append(line)
    return markdown(headings, cells)


def main() -> None:
    options = arguments(__doc__ or "", 2, RESULTS / "ondevice_full.json", depth=2)
    with random_transformer(options.depth) as model:
        behind_disk = stream(model, options.runs)
        print(behind_disk, flush=True)
        measured, rows = {}, list[Row]()
        for size, shape in SIZES.items():
            measured[size] = found = evaluate(model, shape, options.runs)
            print(size, found, flush=True)
            scaled = replace(
                found, whole=found.whole / options.depth, merged=found.merged / options.depth
            )
            rows += table(size, scaled, behind_disk.hidden)
    print(show(rows))
    result = {
        "runs": options.runs,
        "depth": options.depth,
        "read": READ,
        "stream": asdict(behind_disk),
        "measured": {size: asdict(found) for size, found in measured.items()},
        "rows": [asdict(row) for row in rows],
    }
    write_json(options.json, result)


if __name__ == "__main__":
    main()
