"""Sequences of pictures are all or nothing, however the process that writes them ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.utils.files import recover
from mlx_sora.utils.leftovers import JOURNAL, owned_name
from mlx_sora.video import Video
from mlx_sora.video.output_path import check_output, existing_files, frame_path
from mlx_sora.video.writer import save_frames

PROGRAM = Path(__file__).parents[2] / "helpers" / "programs" / "sequence_killed.py"

#: Renames of a sequence of three frames that replaces one of four: four away, three into place.
OLD, NEW = 4, 3


def frames(count: int, grey: int) -> np.ndarray:
    return np.full((count, 16, 16, 3), grey, np.uint8)


def greys(pattern: Path) -> list[int]:
    """Return the grey of each frame of a sequence; other visible files are an error."""
    files = sorted(file for file in pattern.parent.iterdir() if not file.name.startswith("."))
    assert files == [frame_path(pattern, i) for i in range(len(files))]
    return [int(np.asarray(Image.open(file))[0, 0, 0]) for file in files]


def write_and_end(pattern: Path, number: signal.Signals, at: int, when: str, *more: str) -> int:
    """Write three frames in a process that gets a signal in rename `at`; return its exit code."""
    command = [sys.executable, str(PROGRAM), str(pattern), str(NEW), "200", str(int(number))]
    return subprocess.run([*command, str(at), when, *more], check=False).returncode


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(NEW))
def test_a_sequence_killed_while_renamed_is_unfinished(tmp_path: Path, at: int, when: str) -> None:
    pattern = tmp_path / "f_%02d.png"
    assert write_and_end(pattern, signal.SIGKILL, at, when) == -signal.SIGKILL
    if (at, when) != (NEW - 1, "after"):
        check_output(pattern)
        save_frames(pattern, frames(NEW, 200), 8)
    assert greys(pattern) == [200] * NEW
    recover(tmp_path)
    assert greys(pattern) == [200] * NEW
    assert len(list(tmp_path.iterdir())) == NEW


@pytest.mark.parametrize("at", [0, 2, OLD, OLD + 1, OLD + 2, OLD + NEW - 1])
def test_old_frames_come_back_after_a_kill(tmp_path: Path, at: int) -> None:
    pattern = tmp_path / "f_%02d.png"
    save_frames(pattern, frames(OLD, 10), 8)
    assert write_and_end(pattern, signal.SIGKILL, at, "before", "overwrite") == -signal.SIGKILL
    with pytest.raises(UsageError, match="exists already"):
        check_output(pattern)
    assert greys(pattern) == [10] * OLD
    assert len(list(tmp_path.iterdir())) == OLD


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_wait_for_the_end_of_the_renames(tmp_path: Path, number: signal.Signals) -> None:
    pattern = tmp_path / "f_%02d.png"
    save_frames(pattern, frames(OLD, 10), 8)
    code = write_and_end(pattern, number, OLD + 1, "before", "overwrite")
    assert code == (130 if number == signal.SIGINT else -number)
    assert greys(pattern) == [200] * NEW
    assert len(list(tmp_path.iterdir())) == NEW


@pytest.mark.parametrize("at", range(OLD + NEW))
def test_old_frames_come_back_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    pattern = tmp_path / "f_%02d.png"
    save_frames(pattern, frames(OLD, 10), 8)
    with monkeypatch.context() as patch:
        fail_from(patch, at)
        with pytest.raises(MlxSoraError, match="disk fails"):
            save_frames(pattern, frames(NEW, 200), 8, overwrite=True)
    check_output(pattern, True)
    assert greys(pattern) == [10] * OLD
    assert len(list(tmp_path.iterdir())) == OLD


def fail_from(patch: pytest.MonkeyPatch, at: int) -> None:
    """Let every rename fail from number `at` on."""
    calls = iter(range(1000))

    def counted(rename: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(calls) >= at:
                raise OSError(errno.EIO, "Input/output error")
            return rename(*arguments)

        return call

    patch.setattr("os.link", counted(os.link))
    patch.setattr("pathlib.Path.replace", counted(Path.replace))
    patch.setattr("pathlib.Path.rename", counted(Path.rename))


def test_a_frame_that_cannot_be_replaced_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pattern = tmp_path / "f_%02d.png"
    save_frames(pattern, frames(NEW, 10), 8)
    rename, link = Path.rename, os.link

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "f_01.png":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return rename(path, target)

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    monkeypatch.setattr("os.link", link)
    found = save_frames(pattern, frames(NEW, 200), 8, overwrite=True)
    assert found == tmp_path / "f_%02d-1.png"
    assert "cannot be replaced" in caplog.text
    old, new = (sorted(tmp_path.glob(name)) for name in ("f_??.png", "f_??-1.png"))
    assert [int(np.asarray(Image.open(f))[0, 0, 0]) for f in [*old, *new]] == [10] * 3 + [200] * 3


def test_a_file_that_cannot_be_replaced_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*paths: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    path = tmp_path / "a.png"
    path.write_text("precious")
    monkeypatch.setattr("pathlib.Path.replace", refuse)
    found = save_frames(path, frames(1, 200), 8, overwrite=True)
    assert found == tmp_path / "a-1.png"
    assert path.read_text() == "precious"
    assert "cannot be replaced (Operation not permitted)" in caplog.text


def test_only_frames_of_the_sequence_are_replaced(tmp_path: Path) -> None:
    others = ("f_1.png", "f_001.png", "f_٠١.png", "f_.png", "f_000000000001.png")
    for name in others:
        (tmp_path / name).write_text("precious")
    pattern = tmp_path / "f_%02d.png"
    assert existing_files(pattern) == []
    save_frames(pattern, frames(OLD, 10), 8)
    save_frames(pattern, frames(NEW, 200), 8, overwrite=True)
    assert [(tmp_path / name).read_text() for name in others] == ["precious"] * len(others)
    assert len(existing_files(pattern)) == NEW


def test_frames_in_other_cases_exist_where_case_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "F_00.PNG").write_text("precious")
    pattern = tmp_path / "f_%02d.png"
    assert existing_files(pattern) == []
    lstat = os.lstat
    upper = {"f_00.png": "F_00.PNG"}
    monkeypatch.setattr(
        "os.lstat", lambda path: lstat(tmp_path / upper.get(Path(path).name, Path(path).name))
    )
    with pytest.raises(UsageError, match="exists already"):
        check_output(pattern)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "broken link"])
def test_what_lies_under_the_name_of_a_frame(tmp_path: Path, kind: str) -> None:
    frame = tmp_path / "f_07.png"
    if kind == "folder":
        frame.mkdir()
    elif kind == "pipe":
        os.mkfifo(frame)
    else:
        frame.symlink_to("other.png")
        if kind == "link":
            (tmp_path / "other.png").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=f"f_07.png is a {kind.partition(' ')[2] or kind}"):
            check_output(tmp_path / "f_%02d.png", overwrite)


def test_a_finished_sequence_is_copied_whole(tmp_path: Path) -> None:
    pattern, request = tmp_path / "f_%02d.png", GenerationRequest(prompt="a")
    save_frames(pattern, frames(NEW, 200), 8)
    video = Video(pattern, request, width=16, height=16, num_frames=NEW, fps=8, seed=1)
    copy = tmp_path / "copy"
    assert video.save(copy / "g_%d.png") == copy / "g_%d.png"
    assert greys(copy / "g_%d.png") == [200] * NEW
    assert video.save(f"{tmp_path}/folder/") == tmp_path / "folder" / "frame_%05d.png"
    with pytest.raises(UsageError, match="one frame"):
        video.save(tmp_path / "a.png")
    (copy / "g_1.png").unlink()
    frame_path(pattern, 1).unlink()
    with pytest.raises(MlxSoraError, match="Cannot write"):
        video.save(copy / "g_%d.png", overwrite=True)
    assert sorted(path.name for path in copy.iterdir()) == ["g_0.png", "g_2.png"]


def test_journals_of_other_machines_and_foreign_ones_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    outside = tmp_path / "precious.png"
    outside.write_text("precious")
    name = owned_name(".0123456789ab", JOURNAL)
    mine = tmp_path / "inner" / name
    mine.write_text(
        f'{{"new": {{"../precious.png": ["a", [{outside.stat().st_ino}, 0, 0]]}}, "old": {{}}}}'
    )
    other = tmp_path / "inner" / (name[:14] + "00000000" + name[22:])
    other.write_text("{}")
    pipe = tmp_path / "inner" / owned_name(".0123456789ab", JOURNAL)
    os.mkfifo(pipe)
    recover(tmp_path / "inner")
    assert outside.read_text() == "precious"
    assert sorted((tmp_path / "inner").iterdir()) == sorted([other, pipe])
