"""A Mac stays awake while a command works; `caffeinate` is a stand-in that writes down its life."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT

STAND_IN = """#!/bin/sh
trap 'echo ended >> "$LOG"; exit' TERM
echo "$@" >> "$LOG"
while true; do sleep 0.05; done
"""

#: The command line on a Mac, as far as sleep goes.
PROGRAM = """
import subprocess, sys
from types import SimpleNamespace
from mlx_sora.cli import awake, main
awake.platform = SimpleNamespace(system=lambda: sys.argv[1])
code = main.main(sys.argv[2:])
children = subprocess.run(["ps", "-o", "args=", "--ppid", str(__import__("os").getpid())],
                          capture_output=True, text=True).stdout
print("left:", [line for line in children.splitlines() if not line.startswith("ps ")])
raise SystemExit(code)
"""

WORDS = ["generate", "-p", "red", "-s", "1", "--steps", "1", "--num-frames", "1", "-o", "a.png"]


def run(
    folder: Path, words: list[str], system: str = "Darwin", caffeinate: bool = True
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the command line; return its process and what the stand-in wrote."""
    path, log = folder / "bin", folder / "log"
    path.mkdir()
    log.touch()
    if caffeinate:
        (path / "caffeinate").write_text(STAND_IN)
        (path / "caffeinate").chmod(0o755)
    more = {"PATH": f"{path}:{os.environ['PATH']}", "LOG": str(log), "PYTHONPATH": str(ROOT)}
    outcome = subprocess.run(
        [sys.executable, "-c", PROGRAM, system, *words],
        env=os.environ | more,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return outcome, log.read_text().splitlines()


@pytest.mark.skipif(sys.platform == "darwin", reason="ps has other options there")
def test_caffeinate_runs_as_long_as_the_command(tmp_path: Path) -> None:
    outcome, log = run(tmp_path, WORDS)
    assert outcome.returncode == 0, outcome.stderr
    assert "left: []" in outcome.stdout, "no process is left, and no zombie"
    started, ended = log
    assert started.startswith("-i -w ")
    assert ended == "ended"


@pytest.mark.skipif(sys.platform == "darwin", reason="ps has other options there")
def test_caffeinate_ends_with_a_command_that_fails(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, [*WORDS, "--steps", "5000"])
    assert outcome.returncode == 2
    assert "left: []" in outcome.stdout


@pytest.mark.parametrize(
    ("words", "system", "caffeinate"),
    [
        ([*WORDS, "--allow-sleep"], "Darwin", True),
        (WORDS, "Linux", True),
        (WORDS, "Darwin", False),
        (["info"], "Darwin", True),
    ],
)
def test_it_is_not_started(tmp_path: Path, words: list[str], system: str, caffeinate: bool) -> None:
    outcome, log = run(tmp_path, words, system, caffeinate)
    assert outcome.returncode == 0, outcome.stderr
    assert log == []


def test_bench_starts_one_for_all_its_runs(tmp_path: Path) -> None:
    words = ["bench", "memory", "--budgets", "1GB", "--steps", "1", "--num-frames", "1"]
    outcome, log = run(tmp_path, words)
    assert outcome.returncode == 0, outcome.stderr
    assert [line for line in log if line.startswith("-i")] == log[:1]
