"""Fast ways against plain ones: both forms of the same result, timed side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)
from benchmarks.common import RESULTS, alternate, arguments, markdown, transient_bytes, write_json

import mlx.core as mx  # isort: skip

from mlx_sora.memory.limits import memory_scope

#: Largest difference of results, in standard deviations.
SAME = 1e-5


@dataclass(frozen=True)
class Study:
    """The same result twice: `without` a choice and with it (`lean`), both evaluated arrays."""

    choice: str
    geometry: str
    without: Callable[[], mx.array]
    lean: Callable[[], mx.array]


@dataclass(frozen=True)
class Row:
    """Medians of a study. Ratios are without / with: of seconds, run by run, with quartiles.

    ratio_by_processor: of processor seconds, which others on the machine disturb less.
    difference: of the two results, in standard deviations; 0 by construction where the choice is
    to do the same once instead of often. bytes: MLX's transient memory.
    """

    choice: str
    geometry: str
    seconds_without: float
    seconds_with: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    ratio_by_processor: float
    bytes_without: int
    bytes_with: int
    difference: float


def normal(*shape: int) -> mx.array:
    return evaluated(mx.random.normal(shape, key=mx.random.key(len(shape))))


def evaluated(x: mx.array) -> mx.array:
    mx.eval(x)
    return x


def timed(work: Callable[[], mx.array], processor: list[float]) -> Callable[[], mx.array]:
    """`work`, which also adds its processor seconds to a list."""

    def run() -> mx.array:
        start = time.process_time()
        out = work()
        processor.append(time.process_time() - start)
        return out

    return run


def measure(study: Study, runs: int) -> Row:
    a, b = study.without(), study.lean()  # also warms up
    difference = float(mx.abs(a - b).max() / mx.std(a))
    del a, b
    peaks = transient_bytes(study.without), transient_bytes(study.lean)
    plain: list[float] = []
    fast: list[float] = []
    times = alternate(runs, timed(study.without, plain), timed(study.lean, fast))
    ratios = [without / lean for without, lean in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Row(
        study.choice,
        study.geometry,
        statistics.median(without for without, _ in times),
        statistics.median(lean for _, lean in times),
        statistics.median(ratios),
        (low, high),
        statistics.median(a / b for a, b in zip(plain, fast, strict=True)),
        *peaks,
        difference,
    )


def table(rows: list[Row]) -> str:
    headings = [
        "choice",
        "geometry",
        "ms without",
        "with",
        "ratio (quartiles)",
        "by processor time",
        "MiB without",
        "with",
    ]
    return markdown(
        headings,
        [
            [
                row.choice,
                row.geometry,
                f"{1e3 * row.seconds_without:.3g}",
                f"{1e3 * row.seconds_with:.3g}",
                "{:.3g} ({:.3g}–{:.3g})".format(row.ratio, *row.ratio_quartiles),
                f"{row.ratio_by_processor:.3g}",
                f"{row.bytes_without / 2**20:.3g}",
                f"{row.bytes_with / 2**20:.3g}",
            ]
            for row in rows
        ],
    )


def report(doc: str, name: str, studies: Callable[[], Iterator[Study]], same: float = SAME) -> int:
    """Measure, print and write RESULTS / name; 1 if a result changes by more than `same`.

    One study after the other: what one holds is free before the next begins.
    """
    options = arguments(doc, runs=9, json_file=RESULTS / name)
    with memory_scope():
        rows = [measure(study, options.runs) for study in studies()]
    print(table(rows))
    write_json(options.json, {"runs": options.runs, "rows": [asdict(row) for row in rows]})
    return 0 if all(row.difference <= same for row in rows) else 1
