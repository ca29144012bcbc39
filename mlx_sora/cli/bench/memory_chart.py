"""The picture of `bench memory`: seconds and peak against budget, with all resident as a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_BLUE, _GREY, _RED = "#1f5fa8", "#777777", "#b3262e"


def draw_memory(record: Mapping[str, Any], path: Path) -> None:
    """Draw the record of a bench as PNG into `path`, whatever its name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    scale, unit = (1e9, "GB") if record["plan"]["peak"] >= 2e9 else (1e6, "MB")
    rows = [row for row in record["rows"] if row["budget"] is not None]
    (free,) = (row["measured"] for row in record["rows"] if row["budget"] is None)
    left, right = figure.subplots(1, 2)
    _panel(left, rows, free, lambda measured: measured["seconds"], scale)
    _panel(right, rows, free, lambda measured: measured["peak"] / scale, scale)
    budgets = [row["budget"] / scale for row in rows]
    right.plot(budgets, budgets, color=_GREY, lw=1, label="the budget")
    left.set(xlabel=f"budget, {unit}", ylabel="seconds of all stages", ylim=(0, None))
    right.set(xlabel=f"budget, {unit}", ylabel=f"peak {record['peak_is']}, {unit}", ylim=(0, None))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    title = "{model}, {width}×{height}, {num_frames} frames, {steps} steps"
    figure.suptitle(title.format(**record["settings"]))
    figure.savefig(path, format="png", dpi=130)


def _panel(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    free: Mapping[str, Any] | None,
    value: Callable[[Mapping[str, Any]], float],
    scale: float,
) -> None:
    """Measured points, budgets that were refused, and the run with all blocks resident."""
    done = [row for row in rows if row["measured"]]
    x = [row["budget"] / scale for row in done]
    axes.plot(x, [value(row["measured"]) for row in done], "o-", color=_BLUE, label="measured")
    for number, row in enumerate(row for row in rows if not row["measured"]):
        label = None if number else "not possible"
        axes.axvline(row["budget"] / scale, color=_RED, lw=1, ls=":", label=label)
    if free:
        axes.axhline(value(free), color=_GREY, lw=1.2, ls="--", label="all resident, no budget")
    axes.spines[["top", "right"]].set_visible(False)
