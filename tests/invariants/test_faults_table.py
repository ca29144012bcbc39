"""The committed table of faults: in step with its file, with nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

from tests.longrun.table import FILE, README, keep, markdown, row, with_table


def test_nothing_was_lost() -> None:
    rows = json.loads(FILE.read_text())
    assert sum(item["runs"] for item in rows if item["fault"] == "SIGKILL") >= 50
    assert [item for item in rows if item["lost"] != 0 or item["runs"] < 1] == []


def test_the_table_is_in_step() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run: python -m tests.longrun.table"


def test_new_rows_replace_those_of_the_same_fault_and_place(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    keep(file, [row("b", "x", 1, 0, "old"), row("a", "x", 2, 0, "fine")])
    keep(file, [row("b", "x", 3, 0, "new")])
    kept = json.loads(file.read_text())
    assert [(item["fault"], item["runs"]) for item in kept] == [("a", 2), ("b", 3)]
    assert markdown(kept).splitlines()[-1] == "| | together | 5 | 0 | |"
