"""What disks do to a video on its way: full, out of quota, gone. One line, and nothing is left."""

from __future__ import annotations

import errno
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mlx_sora import Pipeline, UsageError
from mlx_sora.errors import MlxSoraError
from mlx_sora.pipeline.locks import lock_path, output_lock
from mlx_sora.runtime.events import Event, Finished, StageStarted, StepFinished
from mlx_sora.utils.files import atomic_write, explain_os_errors
from mlx_sora.video.writer import open_writer, save_frames, write_sidecar

KINDS = ("a.mp4", "a.gif", "a.webp", "a_%03d.png", "new/a_%03d.png")

NOISE = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)


@contextmanager
def files_up_to(count: int) -> Iterator[None]:
    """The system lets no file grow beyond `count` bytes: as a full disk, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", [*KINDS, "a.png"])
@pytest.mark.parametrize("room", [0, 100, 5000])
def test_no_room_leaves_nothing(tmp_path: Path, name: str, room: int) -> None:
    frames = NOISE[:1] if name == "a.png" else NOISE
    with files_up_to(room), pytest.raises(MlxSoraError, match=r"Cannot write .*large.*ulimit"):
        save_frames(tmp_path / name, frames, 8, {"request": {}})
    assert list(tmp_path.iterdir()) == []
    assert save_frames(tmp_path / name, frames, 8) == tmp_path / name


def test_no_room_for_the_sidecar(tmp_path: Path) -> None:
    with files_up_to(100), pytest.raises(MlxSoraError, match="Cannot write .*a.json"):
        write_sidecar(tmp_path / "a.mp4", {"text": "a" * 1000})
    assert list(tmp_path.iterdir()) == []


def write_while_it_goes(folder: Path, name: str) -> None:
    with open_writer(folder / name, 64, 64, 8) as writer:
        writer.write(NOISE[:2])
        shutil.rmtree(folder)
        writer.write(NOISE[2:])


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_that_vanishes(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(MlxSoraError, match=r"Cannot write .*folder is gone"):
        write_while_it_goes(folder, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "Make room"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "rights"),
        (errno.EACCES, "rights"),
        (errno.EIO, "disk fails"),
        (errno.ESTALE, "rights"),
    ],
)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("step", ["sync", "rename"])
def test_every_refusal_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, says: str, step: str
) -> None:
    """Some disks tell only at the end, when all is to be on them."""

    def refuse(*arguments: object) -> None:
        raise OSError(code, "Refused")

    if step == "sync":
        monkeypatch.setattr("os.fsync", refuse)
    else:
        monkeypatch.setattr("os.link", refuse)
        monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(MlxSoraError, match=says) as error:
        save_frames(tmp_path / name, NOISE, 8)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_taken_for_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), atomic_write(tmp_path / "a"):
        raise ValueError("mine")
    with pytest.raises(KeyboardInterrupt), explain_os_errors(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def run_until(events: Iterator[Event], stage: str) -> None:
    """Let a run come to the beginning of a stage."""
    for event in events:
        if isinstance(event, StageStarted) and event.stage == stage:
            return
    raise AssertionError(f"no stage {stage}")


PROMPT = "a red circle moving right on a black background"


def stream(pipe: Pipeline, output: Path, **options: object) -> Iterator[Event]:
    from mlx_sora import GenerationRequest

    values = {"prompt": PROMPT, "steps": 1, "num_frames": 1, "seed": 1, "output": str(output)}
    return pipe.stream(GenerationRequest.from_dict({**values, **options}))


@pytest.mark.parametrize("name", ["a.webp", "a_%d.png"])
def test_an_output_that_appears_while_denoising_costs_nothing(
    pipe: Pipeline, tmp_path: Path, name: str
) -> None:
    events = stream(pipe, tmp_path / name)
    run_until(events, "denoise")
    taken = tmp_path / name.replace("%d", "0")
    taken.write_text("precious")
    *_, last = events
    assert isinstance(last, Finished)
    assert last.video.path is not None
    assert last.video.path.name == name.replace(".", "-1.")
    assert taken.read_text() == "precious"


def test_an_output_folder_that_goes_while_denoising_is_made_again(
    pipe: Pipeline, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    events = stream(pipe, tmp_path / "folder" / "a.mp4")
    run_until(events, "denoise")
    shutil.rmtree(tmp_path / "folder")
    list(events)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a.mp4"]


def test_a_full_disk_leaves_the_checkpoint_to_go_on_from(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "a.webp"
    with monkeypatch.context() as patch:
        patch.setattr("mlx_sora.video.writer.rename_into_place", refuse)
        with pytest.raises(MlxSoraError, match="Make room"):
            list(stream(pipe, output, checkpoint_every=1))
    (kept,) = tmp_path.iterdir()
    assert kept.name.endswith(".checkpoint.safetensors")
    events = list(stream(pipe, output, checkpoint_every=1))
    assert not [event for event in events if isinstance(event, StepFinished)]
    assert list(tmp_path.iterdir()) == [output]


# One run per output.


@pytest.mark.parametrize("name", ["a.webp", "new/a_%d.png"])
def test_while_a_run_goes_on_its_output_is_taken(pipe: Pipeline, tmp_path: Path, name: str) -> None:
    first = stream(pipe, tmp_path / name)
    run_until(first, "encode")
    with (
        pytest.raises(UsageError, match=f"Another run is making .*{name}"),
        output_lock(tmp_path / name),
    ):
        pass
    with output_lock(tmp_path / "b.webp"):
        *_, last = first
    assert isinstance(last, Finished)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {name.rpartition("/")[2].replace("%d", "0")}


def test_a_run_that_ends_early_gives_its_output_back(pipe: Pipeline, tmp_path: Path) -> None:
    for _ in range(2):
        events = stream(pipe, tmp_path / "new" / "a_%d.png")
        run_until(events, "encode")
        events.close()  # type: ignore[attr-defined]
        assert list(tmp_path.iterdir()) == []


def killed_holder(output: Path) -> None:
    """Another process holds `output`, which is refused to this one, until it is killed."""
    hold = "import sys, time; from pathlib import Path\n"
    hold += "from mlx_sora.pipeline.locks import output_lock\n"
    hold += "with output_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(output)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="Another run"), output_lock(output):
            pass
        process.kill()


def test_other_processes_are_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    output = tmp_path / ("long" * 60 + ".mp4")
    killed_holder(output)
    assert lock_path(output).exists()
    with output_lock(output):
        pass
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_locked_runs_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    output = tmp_path / "new" / "a.mp4"
    with output_lock(output), output_lock(output), output_lock(None):
        assert list(tmp_path.glob("new/*")) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", KINDS)
def test_a_disk_that_lets_nothing_be_removed_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def no_room(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    monkeypatch.setattr("os.unlink", refuse)
    with pytest.raises(MlxSoraError, match="Make room"):
        save_frames(tmp_path / name, NOISE, 8)
