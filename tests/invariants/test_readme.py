"""Every command and program in the README works, and its tables are the real ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.invariants.readme import README, REQUEST_README, TABLES, with_tables

TEXT = README.read_text(encoding="utf-8")
SETUP = (
    'pip install -e . && python -m mlx_sora generate --prompt "a red circle moving right on a '
    'black background"',
    'pip install -e ".[dev]" && python -m pytest',
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Shell commands in order. Installing and running this suite is what CI does around it."""
    steps = [step for line in "".join(blocks("bash")).splitlines() for step in line.split(" && ")]
    return [s for s in steps if not s.startswith("pip ") and s != "python -m pytest"]


def run(command: list[str], folder: Path) -> set[Path]:
    """The files that a command adds; it has to succeed."""
    before = set(folder.iterdir())
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return set(folder.iterdir()) - before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder for all: later commands use the files of earlier ones."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("line", SETUP)
def test_the_set_up_is_two_commands(line: str) -> None:
    assert line in "".join(blocks("bash")).splitlines()


@pytest.mark.parametrize("command", commands())
def test_command(command: str, folder: Path) -> None:
    made = run(["bash", "-euc", command], folder)
    if " generate " in command and "--dry-run" not in command:
        assert made, "no file was written"


@pytest.mark.parametrize("program", blocks("python"))
def test_program(program: str, folder: Path) -> None:
    assert run([sys.executable, "-c", program], folder), "no file was written"


@pytest.mark.parametrize("path", [README, REQUEST_README], ids=["package", "request"])
def test_the_tables_are_in_step(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python -m tests.invariants.readme"


@pytest.mark.parametrize("name", TABLES)
def test_each_table_has_its_place(name: str) -> None:
    text = TEXT + REQUEST_README.read_text(encoding="utf-8")
    assert text.count(f"<!-- {name}: ") == text.count(f"<!-- /{name} -->") == 1


def test_links_into_the_repository_exist() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert targets
    assert [t for t in targets if not (README.parent / t).exists()] == []
