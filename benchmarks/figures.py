"""Writes measured figures into the tables and sentences of the READMEs that cite them.

    python -m benchmarks.figures

A table is found by its heading, a row by its first cell, a figure of a sentence by the words around
it. Rows that results lack stay. What sentences conclude from figures is not looked at.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

ROOT = Path(__file__).parents[1]
Row = Mapping[str, Any]
#: First cell -> the other cells.
Cells = Mapping[str, Sequence[str]]


def documents() -> list[Path]:
    """Return the READMEs that cite results."""
    return [ROOT / "README.md", ROOT / "benchmarks/README.md", *ROOT.glob("mlx_sora/*/README.md")]


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def _rows(name: str) -> dict[str, Row]:
    return {row["row"]: row for row in _results(name)["rows"]}


def _share(value: float) -> str:
    return f"{value:.0%}".replace("%", " %")


def _quality(row: Row) -> tuple[str, str]:
    """PSNR and adherence; exact rows have no PSNR."""
    decibels = "–" if row["row"] == "exact" else "exact"
    if row["psnr"] is not None:
        decibels = f"{row['psnr']:.1f} dB"
    return decibels, _share(row["adherence"]["all"])


def _count(value: float) -> str:
    return f"{value:.0f}"


def _speed(value: float) -> str:
    return f"{value:.1f}×" if value == 1 or value >= 1.15 else f"{value:.2f}×"


def ondevice() -> Cells:
    """Return the rows of both lengths side by side."""
    short, long = _rows("ondevice"), _rows("ondevice_51")
    cells = dict[str, list[str]]()
    for name in short.keys() & long.keys():
        pair = short[name], long[name]
        counts = dict.fromkeys(_count(row["evaluations"]) for row in pair)
        cells[name] = [" and ".join(counts)]
        for row, rows in zip(pair, (short, long), strict=True):
            decibels, right = _quality(row)
            motion = _share(row["motion"] / rows["exact"]["motion"])
            cells[name] += [f"{row['stage_speed']:.2f}×", decibels, motion, right]
    return cells


def pareto() -> Cells:
    """Return the rows of the caches."""
    return {
        name: (_count(row["evaluations"]), _speed(row["speed"]), *_quality(row))
        for name, row in _rows("pareto").items()
    }


def merging() -> Cells:
    """Return the rows of token merging, alone and beside a step cache."""
    return {
        row["row"].removeprefix("tdtm "): (
            *(f"{row['speeds'][size]:.2f}×" for size in ("240p", "paper")),
            _quality(row)[0],
            _share(row["motion"]),
            _quality(row)[1],
        )
        for row in _results("tdtm")["rows"]
    }


def presets() -> Cells:
    """Return the row of each preset but exact, with its flags."""
    rows, named = _rows("pareto"), _results("pareto")["presets"]
    return {
        f"`{name}`": (
            "`" + " ".join(f"--{p.replace('_', '-', 1)}" for p in row.split(" + ")) + "`",
            *pareto()[row],
        )
        for name, row in named.items()
        if row in rows and row != "exact"
    }


def text_by_time() -> Cells:
    """Return what both halves show of their texts, and how late the second colour comes."""
    cells = {}
    for name, lines in _results("text_by_time")["rows"].items():
        late = [line["late"] for line in lines if line.get("late") is not None]
        shares = [
            _share(
                statistics.fmean(all(line[f"{field} {half}"] for field in fields) for line in lines)
            )
            for fields in (("colour", "shape", "background"), ("motion",))
            for half in (1, 2)
        ]
        count = f"{statistics.median(late):.0f} in {len(late)} of {len(lines)}" if late else ""
        cells[name] = (*shares, count)
    return cells


#: Rule of leaps.json -> its row.
_LEAPS = {
    "t": "flow time (`t`)",
    "cosine": "cosine of the last two velocities",
    "curvature": "curvature: change of the velocity per time, times t² / 2",
    "fitted": "all of these and the speed, fitted to the error",
    "oracle": "an oracle that knows the error",
    "order 1": "`order=1` after 15 steps",
}


def leaps() -> Cells:
    """Return what each rule gains over a leap after 15 steps, by length and for all lengths."""
    rows = [row for row in _results("leaps")["rules"] if round(row["steps"]) == 15]
    return {
        name: [
            f"{row['pooled_gain']:+.2f} dB, {_share(row['better'])}".replace("-", "−")
            for row in rows
            if row["rule"] == rule
        ]
        for rule, name in _LEAPS.items()
    }


_LENGTH = "speed | PSNR | motion | adherence"

#: Heading of a table -> its rows.
TABLES: Mapping[str, Callable[[], Cells]] = {
    f"| | evaluations | 17 frames: {_LENGTH} | 51 frames: {_LENGTH} |": ondevice,
    "| `--tdtm` | 240p | paper's size | PSNR | motion | adherence |": merging,
    "| | 240p | paper's size | PSNR | motion | adherence |": merging,
    "| | evaluations | speed | PSNR | adherence |": pareto,
    "| preset | stands for | evaluations | speed | PSNR | adherence |": presets,
    "| rule | image | 17 frames | 34 frames | all lengths, one threshold |": leaps,
    "| | object 1 | object 2 | motion 1 | motion 2 | frames late |": text_by_time,
}


def sentences() -> Iterator[tuple[str, str]]:
    """Yield patterns of one group, and what the group has to be."""
    least = min(
        (row for row in _results("memory")["rows"] if row["bits"] == 16),
        key=lambda row: row["budget"],
    )
    fast = _rows("pareto")[_results("pareto")["presets"]["fast"]]
    yield r"\*\*([\d.]+) GB\*\*: peak memory of the whole process", f"{least['peak'] / 1e9:.2f}"
    yield r"within a budget of (\d+) MB\. Blocks", f"{least['budget'] / 1e6:.0f}"
    yield r"\*\*([\d.]+) times\*\* the speed of the denoising steps", f"{fast['speed']:.1f}"
    yield r"([\d.]+) dB from the exact videos", f"{fast['psnr']:.1f}"
    yield r"many correct ones \((\d+) %\)", f"{100 * fast['adherence']['all']:.0f}"
    runs = sum(row["runs"] for row in _results("faults"))
    yield r"\*\*([\d,]+)\*\* kills, full disks", f"{runs:,}"


def with_figures(text: str) -> str:
    """Return the text of a README with the figures of today."""
    lines, rows = list[str](), dict[str, Sequence[str]]()
    for line in text.splitlines(keepends=True):
        if line.strip() in TABLES:
            rows = dict(TABLES[line.strip()]())
        elif not line.startswith("|"):
            rows = {}
        name = line.strip("| \n").partition(" |")[0]
        lines.append(f"| {' | '.join([name, *rows[name]])} |\n" if name in rows else line)
    found = "".join(lines)
    for pattern, value in sentences():
        found = re.sub(pattern, lambda m, value=value: m[0].replace(m[1], value, 1), found)
    return found


def main() -> None:
    for path in documents():
        path.write_text(with_figures(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
