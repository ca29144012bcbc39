"""Every script in examples/ runs on the bundled model and writes something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mlx_sora
from tests.helpers.server_process import server_process

EXAMPLES = Path(__file__).parents[2] / "examples"

#: Those that need a server.
CLIENTS = [EXAMPLES / "openai_client.py", EXAMPLES / "curl.sh"]


def check(script: Path, folder: Path, env: dict[str, str] | None = None) -> None:
    shell = "bash" if script.suffix == ".sh" else sys.executable
    result = subprocess.run(
        [shell, str(script)], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert result.stdout.strip()
    assert any(file.stat().st_size > 500 for file in folder.iterdir())


@pytest.mark.parametrize(
    "script", sorted({*EXAMPLES.glob("*.py")} - {*CLIENTS}), ids=lambda path: path.stem
)
def test_example(script: Path, tmp_path: Path) -> None:
    check(script, tmp_path)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server, as the examples take it."""
    with server_process(tmp_path_factory.mktemp("serve") / "videos") as server:
        yield f"{server.link}v1"


@pytest.mark.parametrize("script", CLIENTS, ids=lambda path: path.name)
def test_example_of_a_client(script: Path, url: str, tmp_path: Path) -> None:
    check(script, tmp_path, {**os.environ, "OPENAI_BASE_URL": url})


def outputs(cells: list[Any]) -> list[list[list[str]]]:
    """What each cell shows: the kinds of its outputs, and of their data."""
    return [
        [sorted(each.get("data", [each["output_type"]])) for each in cell.get("outputs", [])]
        for cell in cells
    ]


def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs, and holds what it shows; to renew it: jupyter execute --inplace FILE."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    file = EXAMPLES / "notebook.ipynb"
    assert file.stat().st_size < 1_000_000
    stored = json.loads(file.read_text(encoding="utf-8"))["cells"]
    notebook = nbformat.read(file, as_version=4)
    monkeypatch.setenv("PYTHONPATH", str(Path(mlx_sora.__file__).parents[1]))
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert outputs(notebook.cells) == outputs(stored), "store it anew"
    assert sum("text/html" in kinds for cell in outputs(stored) for kinds in cell) >= 5
    assert "<video" in str(stored)
    assert (tmp_path / "circle.gif").stat().st_size > 500
