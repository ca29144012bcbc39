"""MLX's folder of compiled kernels, which all users of a machine share.

Report: Unity-Technologies/ml-agents#6056 (a folder in /tmp that only its first user may use).
A full disk, a crash or a failing disk leaves kernels that are cut or partly zeros. MLX loads them:
a bus error, a segmentation fault.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
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


def test_a_full_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def allocate(handle: int, offset: int, count: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    assert reason(monkeypatch, tmp_path, caplog) == "no space left on device"


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of its own, mounted with the options of the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("disk", "expected"),
    [
        ("size=1m", "no space left on device"),
        ("noexec", "nothing may be executed there"),
        ("ro", "read-only file system"),
    ],
    indirect=["disk"],
)
def test_disks_that_take_no_kernels(
    disk: Path, expected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert reason(monkeypatch, disk, caplog) == expected


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


#: A program with one compiled function, which it computes.
COMPILE = """
from mlx_sora.runtime.compile_cache import ensure_compile_cache
import mlx.core as mx
ensure_compile_cache()
print(mx.compile(lambda x: mx.exp(x) * 2 - x)(mx.zeros(2)).tolist())
"""


def compile_in_child(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    command = [sys.executable, "-c", COMPILE]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for temporary files in which MLX has compiled a kernel."""
    folder = tmp_path_factory.mktemp("compiled")
    child = compile_in_child(folder)
    assert child.stdout == "[2.0, 2.0]\n", child.stderr
    return folder


@pytest.fixture
def kernel(compiled: Path, tmp_path: Path) -> Path:
    """A kernel in a folder of this test, as TMPDIR/mlx/VERSION/cpu/libNAME.so. Never seen."""
    folder = Path(shutil.copytree(compiled, tmp_path / "own"))
    (file,) = folder.glob("mlx/*/cpu/*.so")
    (file.parent / compile_cache.HASHES).unlink(missing_ok=True)
    os.utime(file, (1e9, 1e9))
    return file


def check(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(kernel.parents[3]))
    compile_cache.ensure_compile_cache()
    assert "MLX_DISABLE_COMPILE" not in os.environ


def cut(kernel: Path, size: int) -> None:
    os.truncate(kernel, size)


def zero(kernel: Path, start: int, size: int) -> None:
    with kernel.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))


def link(kernel: Path) -> None:
    kernel.unlink()
    kernel.symlink_to("/nowhere")


def folder(kernel: Path) -> None:
    kernel.unlink()
    kernel.mkdir()


def pipe(kernel: Path) -> None:
    kernel.unlink()
    os.mkfifo(kernel)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: cut(file, 0),
        lambda file: cut(file, file.stat().st_size // 2),
        lambda file: cut(file, file.stat().st_size - 1),
        lambda file: zero(file, file.stat().st_size // 2, file.stat().st_size // 2),
        lambda file: zero(file, 4096, 4096),
        lambda file: file.write_bytes(b"#!/bin/sh\n"),
        link,
        folder,
        pipe,
    ],
    ids=["empty", "half", "last byte", "zeros", "page", "script", "link", "folder", "pipe"],
)
def test_damaged_kernels_are_removed(
    kernel: Path,
    damage: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(kernel)
    if kernel.is_file():
        os.utime(kernel, (1e9, 1e9))
    check(kernel, monkeypatch)
    assert not os.path.lexists(kernel)
    assert caplog.messages == [f"damaged kernels of MLX in {kernel.parent}: removed 1 of them"]


def test_whole_kernels_stay_and_are_known_by_their_bytes(
    kernel: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check(kernel, monkeypatch)
    check(kernel, monkeypatch)
    assert kernel.is_file()
    assert list(json.loads((kernel.parent / compile_cache.HASHES).read_text())) == [kernel.name]
    assert caplog.messages == []
    content = kernel.read_bytes()
    kernel.write_bytes(content[:4300] + bytes([content[4300] ^ 1]) + content[4301:])
    os.utime(kernel, (1e9, 1e9))
    check(kernel, monkeypatch)
    assert not kernel.exists()


def test_a_kernel_that_another_process_writes_is_waited_for(
    kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = kernel.read_bytes()
    kernel.write_bytes(content[:5000])

    def write() -> None:
        time.sleep(0.3)
        kernel.write_bytes(content)

    writer = threading.Thread(target=write)
    writer.start()
    check(kernel, monkeypatch)
    writer.join()
    assert kernel.read_bytes() == content


def test_a_cut_kernel_ends_no_process(kernel: Path) -> None:
    cut(kernel, kernel.stat().st_size // 2)
    os.utime(kernel, (1e9, 1e9))
    child = compile_in_child(kernel.parents[3])
    assert (child.returncode, child.stdout) == (0, "[2.0, 2.0]\n"), child.stderr
    assert "removed 1 of them" in child.stderr
    assert kernel.stat().st_size > 5000
