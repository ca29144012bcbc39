"""Every command and program in the README and the guides works; flags, links and tables are real.

tests/cli/test_serve.py runs those of the server's guide, which need a server, and
tests/cli/test_opensora.py those for people who come from Open-Sora, most of them in one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import RESULTS
from mlx_sora.cli.flags import parse_args
from mlx_sora.cli.main import build_parser
from tests.invariants.readme import DOCUMENTS, README, TABLES, with_tables

TEXTS = {
    path.parent.name if path != README else "top": path.read_text("utf-8") for path in DOCUMENTS
}
RUN = {name: text for name, text in TEXTS.items() if name not in ("server", "cli")}
INSTALLATION = """\
pip install .
python -m mlx_sora generate --prompt "a red circle moving right on a black background"
"""
FILE = re.compile(r"[\w-]+\.(mp4|mov|webm|png|gif|webp)")


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(r" \\\n +", " ", block) for block in found]


def commands(text: str) -> list[str]:
    """Shell commands in order. Installing and running this suite is what CI does around it."""
    steps = [step for block in blocks(text, "bash") for step in re.split(r"\n| && ", block)]
    return [s for s in steps if s and not s.startswith("pip ") and s != "python -m pytest"]


def distinct(lists: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(item for items in lists for item in items))


def run(command: list[str], folder: Path) -> set[Path]:
    """The files that a command adds; it has to succeed."""
    before = set(folder.iterdir())
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "warning:" not in result.stderr
    return set(folder.iterdir()) - before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder for all: what two documents share is run once."""
    return tmp_path_factory.mktemp("readme")


def test_the_installation_is_two_commands() -> None:
    assert INSTALLATION in blocks(TEXTS["top"], "bash")


def test_the_readme_is_short() -> None:
    assert len(TEXTS["top"].splitlines()) <= 150


@pytest.mark.parametrize("name", RUN)
def test_commands_that_are_not_run_are_understood(name: str) -> None:
    """Those that download, serve or measure stand in blocks of the language `sh`."""
    for line in "".join(blocks(RUN[name], "sh")).splitlines():
        for step in line.partition(" #")[0].split(" && "):
            if "python -m mlx_sora " in step:
                words = shlex.split(step.partition("python -m mlx_sora ")[2])
                parse_args(build_parser(), words)


@pytest.mark.parametrize("command", distinct(commands(text) for text in RUN.values()))
def test_command(command: str, folder: Path) -> None:
    made = run(["bash", "-euc", command], folder)
    if " generate " in command and "--dry-run" not in command:
        assert made, "no file was written"


@pytest.mark.parametrize("program", distinct(blocks(text, "python") for text in RUN.values()))
def test_program(program: str, folder: Path) -> None:
    assert run([sys.executable, "-c", program], folder), "no file was written"


@pytest.mark.parametrize("name", RUN)
def test_commands_read_only_what_earlier_ones_write(name: str) -> None:
    written = set[str]()
    for command in commands(RUN[name]):
        words = shlex.split(command)
        outputs = {word for flag, word in pairwise(words) if flag in {"-o", "--output"}}
        read = {word for word in words if FILE.fullmatch(word)} - outputs
        assert read <= written, f"{command} reads {read - written}, which nothing has written"
        written |= outputs


def flags(parser: argparse.ArgumentParser) -> set[str]:
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {flag for child in action.choices.values() for flag in flags(child)}
    return found


def test_flags_exist() -> None:
    #: Flags of `mlx.launch`, pip and pytest.
    others = {"--backend", "--hostfile", "--env", "--compare", "--user"}
    known = flags(build_parser()) | others
    for name, text in TEXTS.items():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"<!--.*?-->", "", text)))
        assert named <= known, f"{name}: {named - known}"


def test_named_modules_and_files_exist() -> None:
    root = README.parent
    for name, text in TEXTS.items():
        for module in re.findall(r"python -m ((?:benchmarks|tests)[\w.]*)", text):
            assert importlib.util.find_spec(module), f"{name}: {module}"
        for file in re.findall(r"python ((?:benchmarks|examples)/[\w/]+\.py)", text):
            assert (root / file).exists(), f"{name}: {file}"


@pytest.mark.parametrize("name", TEXTS)
def test_the_tables_are_in_step(name: str) -> None:
    assert with_tables(TEXTS[name]) == TEXTS[name], "run: python -m tests.invariants.readme"


@pytest.mark.parametrize("name", TABLES)
def test_each_table_has_its_place(name: str) -> None:
    text = "".join(TEXTS.values())
    assert text.count(f"<!-- {name}: ") == text.count(f"<!-- /{name} -->") == 1


@pytest.mark.parametrize("path", DOCUMENTS, ids=TEXTS)
def test_links_into_the_repository_exist(path: Path) -> None:
    targets = re.findall(
        r"\]\((?!https?:)([^)#]+)\)|src=\"(?!https?:)([^\"]+)\"", path.read_text("utf-8")
    )
    assert [t for pair in targets for t in pair if t and not (path.parent / t).exists()] == []


def test_the_readme_links_every_guide() -> None:
    guides = [path.relative_to(README.parent).as_posix() for path in DOCUMENTS[1:]]
    assert [guide for guide in guides if f"({guide}" not in TEXTS["top"]] == []


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def preset_row(name: str) -> Any:
    pareto = results("pareto")
    return next(row for row in pareto["rows"] if row["row"] == pareto["presets"][name])


def test_the_three_numbers_are_the_measured_ones() -> None:
    text = TEXTS["top"]
    smallest = min(
        (row for row in results("memory")["rows"] if row["bits"] == 16),
        key=lambda row: row["budget"],
    )
    assert f"**{smallest['peak'] / 1e9:.2f} GB**" in text
    assert f"a budget of {smallest['budget'] / 1e6:.0f} MB" in text.replace("\n", " ")
    fast = preset_row("fast")
    assert f"**{fast['speed']:.1f} times**" in text
    assert f"{fast['psnr']:.1f} dB" in text
    faults = results("faults")
    assert f"**{sum(row['runs'] for row in faults):,}**" in text
    assert sum(row["lost"] for row in faults) == 0


@pytest.mark.parametrize("preset", ["balanced", "fast"])
def test_the_table_of_presets_is_the_measured_one(preset: str) -> None:
    row = preset_row(preset)
    [line] = [line for line in TEXTS["accel"].splitlines() if line.startswith(f"| `{preset}` ")]
    cells = [f"{row['speed']:.1f}×", f"{row['psnr']:.1f} dB", f"{row['adherence']['all']:.0%}"]
    assert line.replace(" %", "%").endswith(f"| {' | '.join(cells)} |")
