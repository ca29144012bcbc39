"""What killed processes have left is removed by the next one; nothing of a living one is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest

from mlx_sora.manage.staging import replace_folder, restore_folder
from mlx_sora.pipeline.locks import lock_path, output_lock
from mlx_sora.utils.files import atomic_write, partial_name
from mlx_sora.utils.leftovers import (
    is_abandoned,
    owned_name,
    sweep,
    sweep_temporary_folders,
    temporary_folder,
)
from mlx_sora.video.writer import save_frames

#: Prints a line of what it left, then waits to be killed.
HOLD = """
import sys, time
from pathlib import Path
from mlx_sora.pipeline.locks import output_lock
from mlx_sora.utils.files import partial_name
from mlx_sora.utils.leftovers import temporary_folder
output = Path(sys.argv[1])
with output_lock(output), temporary_folder() as folder, temporary_folder(output.parent) as hidden:
    for place in (folder, hidden):
        (place / "file").write_text("text")
    partial_name(output).write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(output: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds an output, a partial file of it and temporary folders; then kill it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder that is the system's folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def test_any_run_in_the_folder_removes_what_a_killed_one_left(
    tmp_path: Path, temporary: Path
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    with holder(folder / "killed.mp4"):
        before = sorted([*folder.iterdir(), *temporary.iterdir()])
        assert len(before) == 4
        use_folders(folder)
        assert sorted([*folder.iterdir(), *temporary.iterdir()]) == before
    use_folders(folder)
    assert [*folder.iterdir(), *temporary.iterdir()] == []


def use_folders(folder: Path) -> None:
    """What other runs do there."""
    with output_lock(folder / "other.mp4"), temporary_folder(), temporary_folder(folder):
        pass


def test_the_next_file_in_a_folder_is_enough(tmp_path: Path) -> None:
    with holder(tmp_path / "killed.mp4"):
        pass
    with atomic_write(tmp_path / "table.json") as file:
        file.partial.write_text("{}")
    (left,) = (path for path in tmp_path.iterdir() if path.name != "table.json")
    assert left.is_dir()  # a temporary folder, for those that make one
    sweep_temporary_folders(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_process_is_known_by_its_start_and_machine(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    own = partial_name(tmp_path / "a.png").name
    prefix, machine, number, start, rest = own.split("-")
    ended = "-".join([prefix, machine, str(process.pid), start, rest])
    reused = "-".join([prefix, machine, number, str(int(start) + 1), rest])
    elsewhere = "-".join([prefix, "0" * 8, str(process.pid), start, rest])
    strange = ".a-b.partial"
    names = [own, ended, reused, elsewhere, strange]
    assert [is_abandoned(name) for name in names] == [False, True, True, False, False]
    for name in names:
        (tmp_path / name).touch()
    save_frames(tmp_path / "b.png", np.zeros((1, 8, 8, 3), np.uint8), 1)
    assert {path.name for path in tmp_path.iterdir()} == {own, elsewhere, strange, "b.png"}


def test_a_process_that_ended_but_was_not_waited_for(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        name = owned_name(".0123456789ab", ".partial").replace(str(os.getpid()), str(process.pid))
        stat = Path(f"/proc/{process.pid}/stat")
        if not stat.exists():
            pytest.skip("needs /proc")
        while ") Z " not in stat.read_text():
            time.sleep(0.01)
        assert is_abandoned(name)


@pytest.mark.parametrize(
    ("content", "age", "stays"),
    [("", 0, True), ("", 3600, False), ("-00000000-1-1-\n", 3600, True)],
)
def test_locks_of_nobody_and_of_other_machines(
    tmp_path: Path, content: str, age: int, stays: bool
) -> None:
    lock = lock_path(tmp_path / "a.mp4")
    lock.write_text(content)
    os.utime(lock, (time.time() - age,) * 2)
    with output_lock(tmp_path / "b.mp4"):
        pass
    assert list(tmp_path.iterdir()) == [lock] * stays


def test_temporary_folders_are_no_way_to_other_files(tmp_path: Path, temporary: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    process = subprocess.Popen(["true"])
    process.wait()
    name = owned_name("mlx_sora", "-x").replace(f"-{os.getpid()}-", f"-{process.pid}-")
    (temporary / name).symlink_to(tmp_path)
    (tmp_path / ".folder.old").mkdir()
    sweep_temporary_folders()
    sweep(tmp_path)
    assert list(temporary.iterdir()) == []
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("moment", ["between", "after"])
def test_a_model_that_was_being_replaced_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    target, staging, process = tmp_path / "model[1]", tmp_path / "new", subprocess.Popen(["true"])
    process.wait()
    for folder in (target, staging):
        folder.mkdir()
        (folder / "file").write_text(folder.name)

    rename = Mock(wraps=os.rename)
    if moment == "between":
        rename.side_effect = [DEFAULT, KeyboardInterrupt]
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: process.pid)
        patch.setattr("os.rename", rename)
        patch.setattr("shutil.rmtree", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            replace_folder(staging, target)
    restore_folder(target)
    assert (target / "file").read_text() == ("new" if moment == "after" else "model[1]")
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["model[1]"] if moment == "after" else ["model[1]", "new"]
    )
