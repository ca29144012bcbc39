"""`python -m tests.fuzz.results RECORD ...`: put records of fuzzing into results and README.

A record is the line of JSON that `python -m tests.fuzz TARGET` prints, in a file. It replaces the
figures of its target; what was found before stays.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.json"
README = FILE.parents[1] / "README.md"

#: Figures of a record.
FIGURES = ("target", "engine", "executions", "seconds", "edges", "leak")

_BLOCK = re.compile(r"(<!-- fuzz: .*? -->\n).*?(<!-- /fuzz -->)", re.DOTALL)

Row = Mapping[str, Any]


def merge(rows: Iterable[Row], records: Iterable[Row]) -> list[Row]:
    """Return the rows with those of `records`, the most executions first."""
    merged = {row["target"]: dict(row) for row in rows}
    for record in records:
        before = merged.get(record["target"], {}).get("findings", [])
        findings = list(dict.fromkeys([*before, *record["findings"]]))
        merged[record["target"]] = {name: record.get(name) for name in FIGURES}
        merged[record["target"]] |= {"findings": findings, "fixed": len(findings)}
    return sorted(merged.values(), key=lambda row: (not _guided(row), -row["executions"]))


def markdown(rows: Iterable[Row]) -> str:
    """Return the table of the README; * marks executions that coverage did not guide."""
    lines = ["| reader | executions | edges | findings, all mended |", "|---|---|---|---|"]
    for row in rows:
        count = f"{row['executions']:,}".replace(",", " ") + ("" if _guided(row) else r" \*")
        found = "; ".join(row["findings"]) or "–"
        lines.append(f"| {row['target']} | {count} | {row['edges'] or '–'} | {found} |")
    total = sum(row["executions"] for row in rows if _guided(row))
    count = f"{total:,}".replace(",", " ")
    lines.append(f"| together, guided | {count} | | |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """Return the README's `text` with the table between its markers renewed."""
    table = markdown(json.loads(FILE.read_text())["rows"])
    return _BLOCK.sub(lambda match: match[1] + table + match[2], text)


def _guided(row: Row) -> bool:
    return bool(row["engine"] == "atheris")


if __name__ == "__main__":
    results = json.loads(FILE.read_text())
    given = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    results["rows"] = merge(results["rows"], given)
    FILE.write_text(json.dumps(results, indent=2) + "\n")
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
