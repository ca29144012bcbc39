"""Runs in threads and forked processes: the process ends cleanly, and no child hangs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.ranks import ROOT

PROGRAM = ROOT / "tests" / "helpers" / "programs" / "run_in_thread.py"


def run(way: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), way],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    "way", ["thread", "streamed", "pool", "unfinished daemon", "waiting daemon"]
)
def test_a_process_ends_cleanly_after_a_run_in_a_thread(way: str) -> None:
    outcome = run(way)
    assert (outcome.returncode, outcome.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "darwin", reason="forks of a process that used Metal crash")
def test_a_forked_process_is_refused_after_mlx_was_used() -> None:
    outcome = run("forked after")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("This process was forked from one that had used MLX")
    assert 'multiprocessing.get_context("spawn")' in outcome.stdout


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not run frameworks after a fork")
def test_a_process_may_be_forked_before_the_first_run() -> None:
    outcome = run("forked before")
    assert outcome.returncode == 0, outcome.stderr
