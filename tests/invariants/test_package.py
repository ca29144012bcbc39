"""The package as pip builds it: a source distribution, the wheel from it, and a run elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

pytest.importorskip("setuptools", "77", reason="pyproject.toml needs it; the extra dev has it")

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])('..'))"


def build(kind: str, source: Path) -> Path:
    """Build in `source`, without a compiler, which the extension may lack; return the file."""
    environment = {**os.environ, "CC": "false", "GZIP": "-1"}
    command = [sys.executable, "-c", BUILD, kind]
    result = subprocess.run(
        command, cwd=source, env=environment, capture_output=True, text=True, check=True
    )
    return source.parent / result.stdout.split()[-1]


def test_a_wheel_brings_the_bundled_model(tmp_path: Path) -> None:
    source = tmp_path / "clone"
    ignored = ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("mlx_sora", "weights"):
        copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        copy(ROOT / name, source / name)
    (source / "weights" / "opensora-1.2" / "vae").mkdir(parents=True)
    (source / "weights" / "opensora-1.2" / "vae" / "config.json").write_text("{}")
    with tarfile.open(build("build_sdist", source)) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(tmp_path.glob("mlx_sora-*/"))
    wheel = build("build_wheel", unpacked)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    inside = {name.removeprefix("mlx_sora/") for name in names if name.startswith("mlx_sora/")}
    tracked = {
        f.relative_to(ROOT).as_posix() for f in (ROOT / "weights/shapes").rglob("*") if f.is_file()
    }
    assert tracked <= inside
    assert {name for name in inside if name.startswith("weights/")} == tracked
    assert {"py.typed", "server/page/index.html", "runtime/_cblas.c"} <= inside
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "weights"))]

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)}
    environment = {k: v for k, v in environment.items() if k != "MLX_SORA_WEIGHTS"}
    result = subprocess.run(
        [sys.executable, "-m", "mlx_sora", "info", "--model", "shapes", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(result.stdout)
    assert Path(found["path"]) == tmp_path / "site" / "mlx_sora" / "weights" / "shapes"
    assert found["checks"]["files"].startswith("sizes as recorded")
