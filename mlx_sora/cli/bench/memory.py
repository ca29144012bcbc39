"""`bench memory`: measure seconds and peak memory of one request within several budgets."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.awake import add_sleep_flag
from mlx_sora.cli.bench.measure import PEAK, Measurement, measure
from mlx_sora.cli.flags import add_debug_flag, add_request_flags, explicit_options
from mlx_sora.cli.generate import load_pipeline
from mlx_sora.errors import MemoryBudgetError, MlxSoraError
from mlx_sora.memory.profiles import format_bytes, parse_bytes
from mlx_sora.request.generation import GenerationRequest, to_command_line
from mlx_sora.runtime.events import STAGES

if TYPE_CHECKING:
    from mlx_sora.memory.speeds import MachineSpeeds
    from mlx_sora.pipeline.pipeline import Pipeline

PROMPT = "a red circle moving right on a black background"

TABLE_HEADER = (
    f"{'budget':<10}{'seconds':>9}{'encode':>9}{'denoise':>9}{'decode':>9}"
    f"{'peak':>10}{'used':>7}{'peak MLX':>10}{'resident':>10}{'streamed':>10}{'estimated':>11}"
)

#: Number of budgets by default.
NUM_BUDGETS = 5


@dataclass(frozen=True)
class BudgetRow:
    """One budget in bytes; None: all blocks resident. Without a measurement, a reason.

    estimated: seconds that follow from the speeds of this machine, if they are known.
    """

    budget: int | None
    measured: Measurement | None = None
    reason: str = ""
    estimated: float | None = None


def add_parser(benches: Any) -> None:
    """Add the bench."""
    parser = benches.add_parser(
        "memory",
        help="seconds and peak memory within several memory budgets",
        description="Run one request without a memory budget and within several, each time in a "
        "new process. The videos are deleted. Options that are not given take the model's "
        "defaults.",
    )
    group = parser.add_argument_group("bench")
    group.add_argument(
        "--budgets",
        type=parse_budgets,
        metavar="BYTES,…",
        help="memory budgets, such as 2GB,3.3GB,8GB; default: five, from the smallest possible "
        "one to the peak with all blocks resident",
    )
    group.add_argument(
        *("--output", "-o"),
        dest="folder",
        type=os.path.expanduser,
        metavar="FOLDER",
        default="bench",
        help="folder of memory.json and memory.png; default: bench",
    )
    group.add_argument(
        "--overwrite", dest="replace_results", action="store_true", help="replace existing results"
    )
    parser.hide(add_sleep_flag(group))
    add_debug_flag(group)
    add_request_flags(parser, "bench")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure without a budget and within each, print the rows and write the results."""
    options = {"prompt": PROMPT, **explicit_options(args), "seed": 0}
    request = GenerationRequest.from_dict(options)
    request.validate()
    from mlx_sora.utils.leftovers import temporary_folder

    files = ResultFiles(Path(args.folder), args.replace_results)
    files.check()
    pipeline = load_pipeline(request.model, request.dtype)
    with temporary_folder() as folder:
        # The plan has to count the writer, which the measured process needs.
        request = replace(request, output=str(folder / "video"))
        rows = measure_rows(pipeline, request, args.budgets)
        result = result_record(pipeline, request, rows)
    files.write(result)
    return 0


def measure_rows(
    pipeline: Pipeline, request: GenerationRequest, budgets: Sequence[int] | None
) -> list[BudgetRow]:
    """Print and return a row without a budget and one for each of `budgets`."""
    from mlx_sora.manage.machine_file import read_speeds

    plan = pipeline.plan(replace(request, memory_budget="off"))
    print(TABLE_HEADER, flush=True)
    speeds, rows = read_speeds().speeds, []
    for budget in (None, *(budgets or evenly_spaced_budgets(plan.smallest, plan.peak))):
        row = measure_row(pipeline, request, budget, speeds)
        print(table_row(row), flush=True)
        rows.append(row)
    return rows


def parse_budgets(text: str) -> list[int]:
    """Return the bytes of `2GB,3.3GB` in increasing order. Raises UsageError."""
    return sorted({parse_bytes(word) for word in text.split(",")})


def evenly_spaced_budgets(smallest: int, peak: int) -> list[int]:
    """Return NUM_BUDGETS budgets from the smallest to the peak, in even ratios, in whole MB."""
    ratio = max(1.0, peak / smallest)
    steps = (smallest * ratio ** (i / (NUM_BUDGETS - 1)) for i in range(NUM_BUDGETS))
    return sorted({-(-int(step) // 10**6) * 10**6 for step in steps})


def measure_row(
    pipeline: Pipeline,
    request: GenerationRequest,
    budget: int | None,
    speeds: MachineSpeeds | None = None,
) -> BudgetRow:
    """Run within `budget`, or give the reason why that is impossible. Raises ChildFailed."""
    from mlx_sora.runtime.device import total_memory

    request = replace(request, memory_budget="off" if budget is None else str(budget))
    try:
        run = pipeline.prepare(request)
    except MemoryBudgetError:
        smallest = format_bytes(pipeline.plan(replace(request, memory_budget="off")).smallest)
        return BudgetRow(budget, reason=f"refused: the smallest possible budget is {smallest}")
    estimated = None if speeds is None else round(run.estimate(speeds).total, 2)
    needed = run.plan.peak
    if needed > total_memory():
        reason = (
            f"not run: needs {format_bytes(needed)}, this machine has "
            f"{format_bytes(total_memory())}"
        )
        return BudgetRow(budget, None, reason, estimated)
    return BudgetRow(budget, measure(to_command_line(request.to_dict())), "", estimated)


def table_row(row: BudgetRow) -> str:
    """Return the row as a line of the table."""
    name = "none" if row.budget is None else format_bytes(row.budget)
    measured = row.measured
    if measured is None:
        return f"{name:<10}  {row.reason}"
    used = "-" if row.budget is None else f"{measured.peak / row.budget:.0%}"
    denoise = measured.stream.get("denoise")
    resident = f"{denoise['resident']} of {denoise['blocks']}" if denoise else "all"
    read = sum(stage["bytes_read"] for stage in measured.stream.values())
    streamed = format_bytes(read) if denoise else "-"
    stages = "".join(f"{measured.stages[stage]:>9.2f}" for stage in STAGES)
    estimated = "-" if row.estimated is None else f"{row.estimated:.2f}"
    return (
        f"{name:<10}{measured.seconds:>9.2f}{stages}{format_bytes(measured.peak):>10}{used:>7}"
        f"{format_bytes(measured.mlx_peak):>10}{resident:>10}{streamed:>10}{estimated:>11}"
    )


def result_record(
    pipeline: Pipeline, request: GenerationRequest, rows: Sequence[BudgetRow]
) -> dict[str, Any]:
    """Return the results as JSON values, with the settings and the machine."""
    from mlx_sora.pipeline.settings import resolve
    from mlx_sora.runtime.device import describe_machine

    plan = pipeline.plan(replace(request, memory_budget="off"))
    return {
        "settings": resolve(request, pipeline.model).to_dict(),
        "plan": {"peak": plan.peak, "smallest": plan.smallest},
        "peak_is": PEAK,
        "rows": [asdict(row) for row in rows],
        "machine": describe_machine(),
    }


@dataclass(frozen=True)
class ResultFiles:
    """The two files of the results in `folder`: JSON and a chart."""

    folder: Path
    overwrite: bool

    def check(self) -> None:
        """Raise UsageError if results cannot be written. Print a note if no chart can be drawn."""
        from mlx_sora.utils.obstacles import check_result_file

        for path in (self._json, self._png):
            check_result_file(path, overwrite=self.overwrite)
        if not _can_draw():
            print(
                f"matplotlib is missing, so {self._png} will not be drawn. "
                'Install it: pip install "mlx_sora[bench]"',
                file=sys.stderr,
            )

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the files and print their paths; only the JSON file if no chart can be drawn."""
        from mlx_sora.utils.files import atomic_write

        text = json.dumps(record, indent=2) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._json, self.overwrite) as file:
                file.partial.write_text(text, encoding="utf-8")
            print(file.path)
            if _can_draw():
                with atomic_write(self._png, self.overwrite) as file:
                    draw_memory(record, file.partial)
                print(file.path)
        except OSError as error:
            raise MlxSoraError(
                f"Cannot write into {self.folder}: {error.strerror or error}.", "Is the disk full?"
            ) from error

    @property
    def _json(self) -> Path:
        return self.folder / "memory.json"

    @property
    def _png(self) -> Path:
        return self.folder / "memory.png"


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


_BLUE, _GREY, _RED = "#1f5fa8", "#777777", "#b3262e"


def draw_memory(record: Mapping[str, Any], path: Path) -> None:
    """Draw a chart of the results into `path`, as PNG whatever its suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    scale, unit = (1e9, "GB") if record["plan"]["peak"] >= 2e9 else (1e6, "MB")
    rows = [row for row in record["rows"] if row["budget"] is not None]
    (resident,) = (row["measured"] for row in record["rows"] if row["budget"] is None)
    left, right = figure.subplots(1, 2)
    _plot(left, rows, resident, lambda measured: measured["seconds"], scale)
    _plot(right, rows, resident, lambda measured: measured["peak"] / scale, scale)
    budgets = [row["budget"] / scale for row in rows]
    right.plot(budgets, budgets, color=_GREY, lw=1, label="the budget")
    left.set(xlabel=f"budget, {unit}", ylabel="seconds of all stages", ylim=(0, None))
    right.set(xlabel=f"budget, {unit}", ylabel=f"peak {record['peak_is']}, {unit}", ylim=(0, None))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    title = "{model}, {width}×{height}, {num_frames} frames, {steps} steps"
    figure.suptitle(title.format(**record["settings"]))
    figure.savefig(path, format="png", dpi=130)


def _plot(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    resident: Mapping[str, Any] | None,
    value: Callable[[Mapping[str, Any]], float],
    scale: float,
) -> None:
    """Plot measured points, impossible budgets, and the run with all blocks resident."""
    measured = [row for row in rows if row["measured"]]
    x = [row["budget"] / scale for row in measured]
    axes.plot(x, [value(row["measured"]) for row in measured], "o-", color=_BLUE, label="measured")
    for number, row in enumerate(row for row in rows if not row["measured"]):
        label = None if number else "not possible"
        axes.axvline(row["budget"] / scale, color=_RED, lw=1, ls=":", label=label)
    if resident:
        axes.axhline(value(resident), color=_GREY, lw=1.2, ls="--", label="all resident, no budget")
    axes.spines[["top", "right"]].set_visible(False)
