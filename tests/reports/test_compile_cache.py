"""MLX's folder of compiled kernels, which all users of a machine share.

Report: Unity-Technologies/ml-agents#6056 (a folder in /tmp that only its first user may use).
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mlx_sora.runtime import compile_cache
from tests.helpers.commands import IMAGE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX compiles on Linux CPUs only")


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_DISABLE_COMPILE", raising=False)
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)


def reason(monkeypatch: pytest.MonkeyPatch, folder: Path, log: pytest.LogCaptureFixture) -> str:
    """Return why compiled functions are off with this folder for temporary files."""
    monkeypatch.setenv("TMPDIR", str(folder))
    compile_cache.ensure_compile_cache()
    off = os.environ.pop("MLX_DISABLE_COMPILE", None)
    assert (off == "1") == bool(log.messages)
    return log.messages[0].partition(" (")[2].partition(")")[0] if log.messages else ""


def test_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert reason(monkeypatch, tmp_path, caplog) == ""
    assert (tmp_path / "mlx" / version("mlx") / "cpu").is_dir()


def test_a_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert reason(monkeypatch, tmp_path / "gone", caplog) == "no such folder"


def test_a_folder_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kernels of others are not loaded either: they are programs."""
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert reason(monkeypatch, tmp_path, caplog) == "it belongs to another user"


def test_a_file_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlx").write_text("")
    assert reason(monkeypatch, tmp_path, caplog) in ("not a directory", "file exists")


def test_a_run_goes_on_without_compiled_functions(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path / "gone")}
    child = subprocess.run(
        [sys.executable, *IMAGE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert "set TMPDIR to a folder of yours" in child.stderr
    assert (tmp_path / "a.png").is_file()
