"""The fast BLAS on Linux, and what happens without one."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_sora.runtime import blas

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="MLX has Accelerate on macOS")

REPORT = """
import json, sys
from mlx_sora.runtime import blas
import mlx.core as mx
b = blas.install()
a = mx.random.normal((96, 64), key=mx.random.key(0))
mx.eval(a @ a.T)
print(json.dumps({"name": b.name, "path": b.path, "fast": b.fast, "notice": b.notice,
                  "calls": b.call_count()}))
"""


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter: the linker chooses once per process."""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def report(**environment: str) -> dict[str, object]:
    environment.setdefault("MLX_SORA_BLAS", "auto")
    result = fresh(REPORT, **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@linux_only
def test_mlx_multiplies_through_the_extension() -> None:
    if not list(Path(blas.__file__).parent.glob("_cblas*.so")):
        pytest.skip("installed without a C compiler")
    answer = report()
    assert answer["name"] == "OpenBLAS of numpy"
    assert (answer["fast"], answer["notice"]) == (True, "")
    assert int(str(answer["calls"])) >= 1


@linux_only
def test_a_clone_uses_the_extension_that_was_installed(tmp_path: Path) -> None:
    """`pip install .` compiles nothing in the clone, whose modules Python imports in its folder."""
    package = Path(blas.__file__).parents[1]
    built = list((package / "runtime").glob("_cblas*.so"))
    if not built:
        pytest.skip("installed without a C compiler")
    clone, installed = tmp_path / "clone", tmp_path / "site-packages"
    shutil.copytree(package, clone / "mlx_sora", ignore=shutil.ignore_patterns("*.so"))
    runtime = installed / "mlx_sora" / "runtime"
    runtime.mkdir(parents=True)
    for file in built:
        shutil.copy(file, runtime)
    own = f"import os, sys; sys.path[:] = [{str(clone)!r}, *(p for p in sys.path if p and not "
    own += "os.path.isdir(os.path.join(p, 'mlx_sora')))]\n"  # not the modules under test
    for path, name in ((str(tmp_path), "MLX's own"), (str(installed), "OpenBLAS of numpy")):
        result = fresh(own + f"sys.path.append({path!r})\n" + REPORT, MLX_SORA_BLAS="numpy")
        assert json.loads(result.stdout)["name"] == name


@linux_only
def test_off_uses_the_blas_of_mlx() -> None:
    answer = report(MLX_SORA_BLAS="off")
    assert (answer["path"], answer["fast"], answer["calls"]) == ("", False, None)
    assert "MLX_SORA_BLAS" in str(answer["notice"])


@linux_only
def test_unknown_choice_lists_the_valid_ones() -> None:
    result = fresh(REPORT, MLX_SORA_BLAS="atlas")
    assert result.returncode == 0
    assert "auto, numpy, mkl, openblas, off" in result.stderr


@linux_only
def test_mlx_loaded_first_warns_once_in_one_line() -> None:
    result = fresh("import mlx.core\n" + REPORT, MLX_SORA_BLAS="auto")
    assert result.returncode == 0
    assert json.loads(result.stdout)["fast"] is False
    assert result.stderr.strip().count("\n") == 0
    assert "import mlx_sora before it" in result.stderr


@linux_only
def test_products_equal_numpy() -> None:
    """All layouts and kinds that MLX hands to BLAS, strides and the complex kind included."""
    code = """
import mlx_sora, mlx.core as mx, numpy as np
rng = np.random.default_rng(0)
for m, n, k in ((1, 7, 5), (33, 17, 65), (128, 96, 64)):
    a, b = rng.standard_normal((m, k)), rng.standard_normal((n, k))
    for x, y in ((a, b), (a + 1j * b[:1], b - 1j * a[:1])):
        kind = np.complex64 if np.iscomplexobj(x) else np.float32
        got = np.array(mx.array(x.astype(kind)) @ mx.array(y.astype(kind)).T)
        np.testing.assert_allclose(got, x @ y.T, rtol=2e-5, atol=2e-5)
        got = np.array(mx.array(x.T.astype(kind)).T @ mx.array(y.T.astype(kind)))
        np.testing.assert_allclose(got, x @ y.T, rtol=2e-5, atol=2e-5)
"""
    result = fresh(code)
    assert result.returncode == 0, result.stderr


def install_with(monkeypatch: pytest.MonkeyPatch, **available: blas.Blas | None) -> blas.Blas:
    """Call `install` as in a process without MLX, where only `available` libraries load."""
    monkeypatch.delenv("MLX_SORA_BLAS", raising=False)
    monkeypatch.delitem(sys.modules, "mlx.core")
    loaders = {name: (lambda name=name: available.get(name)) for name in blas._LOADERS}
    monkeypatch.setattr(blas, "_LOADERS", loaders)
    return blas.install.__wrapped__()


@linux_only
def test_libraries_are_tried_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    mkl, openblas = blas.Blas("MKL", "a.so"), blas.Blas("OpenBLAS", "b.so")
    assert install_with(monkeypatch, mkl=mkl, openblas=openblas) is mkl


@linux_only
def test_no_library_gives_one_line_of_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    found = install_with(monkeypatch)
    assert not found.fast
    assert "\n" not in found.notice
    assert "apt install libopenblas0-pthread" in found.notice


def test_macos_uses_the_blas_of_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    found = blas.install.__wrapped__()
    assert (found.path, found.fast, found.notice) == ("", True, "")


@pytest.mark.parametrize(("platform", "count"), [("linux", 1), ("darwin", 0)])
def test_the_extension_is_built_on_linux_only(
    monkeypatch: pytest.MonkeyPatch, platform: str, count: int
) -> None:
    """On macOS an installation must not wait for a compiler."""
    root = Path(__file__).parents[3]
    built: list[SimpleNamespace] = []
    setuptools = SimpleNamespace(
        Extension=lambda name, sources, **options: SimpleNamespace(sources=sources, **options),
        setup=lambda **options: built.extend(options["ext_modules"]),
    )
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    monkeypatch.setattr(sys, "platform", platform)
    runpy.run_path(str(root / "setup.py"))
    assert len(built) == count
    assert all(extension.optional for extension in built)
    assert all((root / file).is_file() for extension in built for file in extension.sources)
    assert "ext-modules" not in (root / "pyproject.toml").read_text()


@linux_only
def test_a_library_without_the_function_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libopenblas.so").write_bytes(b"not a library")
    assert blas._load_first("OpenBLAS", "libopenblas.so*", "libm.so.6") is None
