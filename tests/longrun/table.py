"""The table of faults tried: rows in a JSON file, and as Markdown in the benchmarks' README.

A long-run test gives its rows to the fixture `fault`; `--faults FILE` keeps them, in place of
earlier ones of the same fault and place. As a module, writes the table into the README.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.json"
README = Path(__file__).parents[2] / "benchmarks" / "README.md"

COLUMNS = ("fault", "where", "runs", "lost", "result")

_BLOCK = re.compile(r"(<!-- faults: .*? -->\n).*?(<!-- /faults -->)", re.DOTALL)

#: fault: what was done. where: stage and kind of output. runs: how often. lost: runs that could not
#: be brought to the same end as an undisturbed one, or left a broken file. result: what was seen.
Row = Mapping[str, str | int]

#: Takes the columns of a row.
Fault = Callable[[str, str, int, int, str], None]


def row(fault: str, where: str, runs: int, lost: int, result: str) -> Row:
    """One line of the table."""
    return dict(zip(COLUMNS, (fault, where, runs, lost, result), strict=True))


def keep(file: Path, rows: Iterable[Row]) -> None:
    """Put rows into the file, which stays sorted."""
    known = json.loads(file.read_text()) if file.exists() else []
    merged = {(item["fault"], item["where"]): item for item in [*known, *rows]}
    file.write_text(json.dumps([merged[key] for key in sorted(merged)], indent=2) + "\n")


def markdown(rows: Iterable[Row]) -> str:
    """Markdown table of the rows, and how many runs there were."""
    rows = list(rows)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(str(item[name]) for name in COLUMNS)} |" for item in rows]
    runs, lost = (sum(int(item[name]) for item in rows) for name in ("runs", "lost"))
    return "\n".join([*lines, f"| | together | {runs} | {lost} | |"]) + "\n"


def with_table(text: str) -> str:
    """README `text` with the table between its markers renewed."""
    table = markdown(json.loads(FILE.read_text()))
    return _BLOCK.sub(lambda match: match[1] + table + match[2], text)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
