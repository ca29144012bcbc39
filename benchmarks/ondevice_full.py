"""What LPL, TDTM and CI-DL save at the size of the published model: 240p, 51 frames, guided.

    python -m benchmarks.ondevice_full [--runs 2] [--depth 3] [--json FILE]

Times one evaluation of a transformer of `--depth` random block pairs (of 28) at full width, in turn
with all frames and merged, resident and streamed from the page cache, and derives the 30 steps of a
run: an evaluation takes 28 / depth as long (embedders and final layer, below 1 % of it, are counted
28 / depth times), and LPL makes 16 of 30. Memory is MLX's peak with this depth. Quality cannot be
had from random weights; `benchmarks/ondevice.py` has it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip

from benchmarks.common import RESULTS, alternate, arguments, markdown, write_json
from benchmarks.full_model import random_transformer
from benchmarks.streaming import Passes, Shape, peak_of
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.accel.tdtm import PairedFrames
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_transformer, stream_transformer
from mlx_sora.memory.limits import release

SHAPE: Shape = (15, 30, 53), (240, 426)
STEPS, DEPTH = 30, 28

#: Evaluations of a run: LPL after 15 steps makes one more, which leaps.
HALF, LEAPT = STEPS // 2, STEPS // 2 + 1


@dataclass(frozen=True)
class Kind:
    """A way to evaluate. resident: blocks that stay, None without streaming."""

    resident: int | None = None
    prefetch: bool = True
    merged: bool = False

    def begin(self, model: ModelFolder, stack: ExitStack) -> Callable[[], object]:
        """One evaluation, ready to run until `stack` closes."""
        tokens = PairedFrames() if self.merged else None
        if self.resident is None:
            network = load_transformer(model, mx.float32)
            return partial(Passes(network, SHAPE, 2), None, tokens)
        network, source = stream_transformer(model, mx.float32)
        stream = BlockStream(source, self.resident, cyclic=True, prefetch=self.prefetch)
        return partial(Passes(network, SHAPE, 2), stack.enter_context(stream), tokens)


EXACT, MERGED = Kind(), Kind(merged=True)
DEMAND, AHEAD = Kind(0, prefetch=False), Kind(0)
SOME, SOME_MERGED = Kind(1), Kind(1, merged=True)
KINDS = (EXACT, MERGED, DEMAND, AHEAD, SOME, SOME_MERGED)

#: Technique → evaluations of a run by kind.
RUNS = {
    "exact": {EXACT: STEPS},
    f"LPL, fixed {HALF}": {EXACT: LEAPT},
    f"TDTM, first {HALF}": {EXACT: STEPS - HALF, MERGED: HALF},
    "TDTM, all": {MERGED: STEPS},
    "CI-DL, on demand": {DEMAND: STEPS},
    "CI-DL, ahead": {AHEAD: STEPS},
    "CI-DL, one block stays": {SOME: STEPS},
    "all three": {SOME_MERGED: HALF, SOME: LEAPT - HALF},
}


@dataclass(frozen=True)
class Row:
    """A technique. evaluations: of a run; seconds: of all of them at full depth, median.

    speed: against exact, median of the runs. memory: MLX's peak in bytes at the measured depth.
    """

    row: str
    evaluations: int
    seconds: float
    speed: float
    memory: int


def peak_alone(kind: Kind, model: ModelFolder) -> int:
    """MLX's peak in bytes over one evaluation, nothing else in memory."""
    with ExitStack() as stack:
        work = kind.begin(model, stack)
        return peak_of(work)


def table(model: ModelFolder, runs: int, depth: int) -> list[Row]:
    """Measure every kind, derive every row."""
    peaks = {}
    for kind in KINDS:
        peaks[kind] = peak_alone(kind, model)
        release()
    with ExitStack() as stack:
        works = [kind.begin(model, stack) for kind in KINDS]
        times = [dict(zip(KINDS, seconds, strict=True)) for seconds in alternate(runs, *works)]

    def totals(counts: Mapping[Kind, int]) -> list[float]:
        return [
            sum(count * once[kind] for kind, count in counts.items()) * DEPTH / depth
            for once in times
        ]

    exact = totals(RUNS["exact"])
    return [
        Row(
            row=name,
            evaluations=sum(counts.values()),
            seconds=statistics.median(totals(counts)),
            speed=statistics.median(a / b for a, b in zip(exact, totals(counts), strict=True)),
            memory=max(peaks[kind] for kind in counts),
        )
        for name, counts in RUNS.items()
    ]


def main() -> None:
    options = arguments(__doc__ or "", 2, RESULTS / "ondevice_full.json", depth=3)
    with random_transformer(options.depth) as model:
        rows = table(model, options.runs, options.depth)
    print(
        markdown(
            ["", "evaluations", "hours", "speed", "peak GB"],
            [
                [
                    row.row,
                    str(row.evaluations),
                    f"{row.seconds / 3600:.2f}",
                    f"{row.speed:.2f}×",
                    f"{row.memory / 1e9:.2f}",
                ]
                for row in rows
            ],
        )
    )
    setting = {"runs": options.runs, "depth": options.depth}
    write_json(options.json, {**setting, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
