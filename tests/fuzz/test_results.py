"""The committed results of fuzzing: in step with the README, with every finding mended."""

from __future__ import annotations

import json

from tests.fuzz.results import FILE, README, merge, with_table
from tests.fuzz.targets import TARGETS
from tests.fuzz.verdict import MAX_LEAK


def test_every_finding_is_mended() -> None:
    rows = json.loads(FILE.read_text())["rows"]
    assert [row for row in rows if row["fixed"] != len(row["findings"])] == []
    assert [row for row in rows if (row.get("leak") or 0) > MAX_LEAK] == []
    assert {row["target"] for row in rows} >= TARGETS.keys()


def test_the_table_is_in_step() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run: python -m tests.fuzz.results"


def test_a_record_replaces_figures_and_adds_findings() -> None:
    row = {"target": "a", "engine": "atheris", "executions": 1, "findings": ["x"], "fixed": 1}
    record = {**row, "executions": 5, "seconds": 1.0, "edges": 2, "leak": 0.0, "findings": ["y"]}
    (merged,) = merge([row], [record])
    assert merged["executions"] == 5
    assert merged["findings"] == ["x", "y"]
