"""`python -m benchmarks.all`: it runs what is not current, once, and goes on where it was."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import figures
from benchmarks.all import ROOT, TABLE, Campaign, Entry, State
from mlx_sora.cli.flags import parse_args
from mlx_sora.cli.main import build_parser

#: Adds a line to a file, then ends with the code in `code`.
APPEND = "-c \"open('{}', 'a').write('row\\\\n'); exit(int(open('code').read()))\""


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """Two lines that need the weights, one that needs the first's result, one that needs none."""
    (tmp_path / "weights").write_text("first")
    (tmp_path / "code").write_text("0")
    table = {
        "rows": Entry((APPEND.format("rows"),), 2, ("weights",), ("rows",), rows=True),
        "whole": Entry((APPEND.format("whole"),), 3, ("weights",), ("whole",)),
        "plot": Entry((APPEND.format("plot"),), 4, ("ro*",), ("plot",)),
        "machine": Entry((APPEND.format("machine"),), 5, (), ("machine",)),
    }
    return Campaign(table, State.read(tmp_path / "measured.json"), tmp_path)


def lengths(campaign: Campaign) -> dict[str, int]:
    """Rows that each line has written."""
    files = {name: campaign.root / name for name in campaign.table}
    return {n: f.read_text().count("row") if f.exists() else 0 for n, f in files.items()}


def again(campaign: Campaign) -> Campaign:
    """The same in a new process."""
    return Campaign(campaign.table, State.read(campaign.state.path), campaign.root)


def test_only_what_changed_is_measured_again(campaign: Campaign) -> None:
    assert campaign.run([*campaign.table]) == []
    assert lengths(campaign) == {"rows": 1, "whole": 1, "plot": 1, "machine": 1}
    campaign = again(campaign)
    assert dict(campaign.reasons([*campaign.table])) == dict.fromkeys(campaign.table, "")
    assert campaign.run([*campaign.table]) == []
    assert lengths(campaign) == {"rows": 1, "whole": 1, "plot": 1, "machine": 1}

    (campaign.root / "weights").write_text("second")
    assert dict(campaign.reasons([*campaign.table])) == {
        "rows": "inputs changed",
        "whole": "inputs changed",
        "plot": "follows from rows",
        "machine": "",
    }
    assert campaign.show([*campaign.table]).endswith("| all |  | 9 |")
    assert campaign.run(["whole"]) == []
    assert lengths(campaign) == {"rows": 1, "whole": 2, "plot": 1, "machine": 1}
    (campaign.root / "machine").unlink()
    assert campaign.reason("machine") == "machine is missing"
    assert campaign.run(["machine"], force=True) == []
    assert lengths(campaign)["machine"] == 1


def test_a_line_that_fails_stops_no_other_and_goes_on_with_its_rows(campaign: Campaign) -> None:
    (campaign.root / "rows").write_text("row\nrow\nrow\n")
    (campaign.root / "code").write_text("1")
    assert campaign.run(["rows", "whole"]) == ["rows", "whole"]
    assert lengths(campaign)["rows"] == 1, "rows of other weights stay"
    (campaign.root / "code").write_text("0")
    campaign = again(campaign)
    assert campaign.reason("whole") == "was interrupted or failed"
    assert campaign.run(["rows", "whole"]) == []
    assert lengths(campaign)["rows"] == 2, "rows of the same weights are lost"
    assert lengths(campaign)["whole"] == 2


def test_results_can_be_recorded_and_a_new_command_shows(campaign: Campaign) -> None:
    (campaign.root / "whole").write_text("by hand")
    assert campaign.reason("whole") == "never recorded"
    campaign.record(["whole"])
    assert campaign.reason("whole") == ""
    other = {"whole": Entry(("-c 'more prompts'",), 1, ("weights",), ("whole",))}
    assert Campaign(other, campaign.state, campaign.root).reason("whole") == "inputs changed"


def test_the_commands_of_the_table_can_be_typed() -> None:
    for name, entry in TABLE.items():
        for command in entry.commands:
            words = shlex.split(command)
            if words[:2] == ["-m", "mlx_sora"]:
                parse_args(build_parser(), words[2:])
                continue
            module = words[0] == "-m" and importlib.util.find_spec(words[1])
            path = Path(str(module.origin)) if module else ROOT / words[0]
            assert path.exists(), f"{name}: {command}"
            known = path.read_text() + (ROOT / "benchmarks/common.py").read_text()
            flags = [word for word in words if word.startswith("--") and "pytest" not in words]
            assert [flag for flag in flags if f'"{flag}"' not in known] == [], name


def test_every_benchmark_imports() -> None:
    """Training alone needs PyTorch; one process, as most of the time is MLX's import."""
    folder = ROOT / "benchmarks"
    names = [path.stem for path in sorted(folder.glob("*.py"))]
    code = "; ".join(f"import benchmarks.{name}" for name in names)
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_the_needs_of_the_table_exist() -> None:
    patterns = {pattern for entry in TABLE.values() for pattern in entry.needs}
    assert [pattern for pattern in patterns if not any(ROOT.glob(pattern))] == []


def test_the_record_names_lines_of_the_table() -> None:
    found = json.loads((ROOT / "benchmarks/measured.json").read_text())
    assert {*found["done"], *found["begun"]} <= TABLE.keys()


@pytest.mark.parametrize("path", figures.documents(), ids=lambda path: path.parent.name)
def test_figures_in_readmes_are_the_measured_ones(path: Path) -> None:
    text = path.read_text("utf-8")
    assert figures.with_figures(text) == text, "run: python -m benchmarks.figures"


def test_a_change_of_a_figure_shows() -> None:
    texts = [path.read_text("utf-8") for path in figures.documents()]
    for pattern, value in figures.sentences():
        [found] = [match for text in texts if (match := re.search(pattern, text))]
        assert found[1] == value
        stale = found[0].replace(value, "0")
        assert figures.with_figures(stale) == found[0]
    lines = {line for text in texts for line in text.splitlines()}
    assert [heading for heading in figures.TABLES if heading not in lines] == []
    heading, cells = [*figures.TABLES.items()][-1]
    name = next(iter(cells()))
    stale = f"{heading}\n|---|\n| {name} | 1 |\n| other | 1 |\n"
    fresh = f"{heading}\n|---|\n| {name} | {' | '.join(cells()[name])} |\n| other | 1 |\n"
    assert figures.with_figures(stale) == fresh
    assert figures.with_figures(f"| {name} | 1 |\n") == f"| {name} | 1 |\n"
