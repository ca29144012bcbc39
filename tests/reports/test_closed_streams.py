"""Programs that close standard streams instead of giving the null device: daemons, launchers.

Reports: tqdm/tqdm#1654, stanfordnlp/stanza#1367 (`sys.stderr` is None). With standard input closed,
MLX takes descriptor 0 of the weights for a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import IMAGE


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_closed_stream_is_no_fault(tmp_path: Path, number: int) -> None:
    # Popen gives every child all three, so a child closes one and becomes the program.
    close = "import os, sys; os.close(int(sys.argv[1])); os.execv(sys.executable, sys.argv[2:])"
    command = [sys.executable, "-c", close, str(number), sys.executable, *IMAGE]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert (tmp_path / "a.png").is_file()


def test_a_path_that_the_encoding_cannot_show_is_printed_with_escapes(tmp_path: Path) -> None:
    command = [sys.executable, *IMAGE[:-1], "ö.png", "--quiet"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    child = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stdout) == (0, "\\xf6.png\n")


def test_without_docstrings_and_asserts(tmp_path: Path) -> None:
    command = [sys.executable, "-OO", *IMAGE, "--quiet"]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert (tmp_path / "a.png").is_file()
