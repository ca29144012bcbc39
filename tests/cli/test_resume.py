"""`generate` after a signal has ended it: the same command or --resume continues."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_sora.video.output_path import CHECKPOINT_SUFFIX

STEPS = 6
WORDS = ["generate", "-p", "a red circle", "--steps", str(STEPS), "--width", "32", "--height", "32"]
WORDS += ["--no-embed-metadata", "--checkpoint-every", "2", "--json-events"]
EACH = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mlx_sora", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, text=True, **pipes)  # type: ignore[call-overload]


def run(folder: Path, *words: str) -> tuple[int, str, str]:
    process = start(folder, *words)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


def interrupt(folder: Path, number: signal.Signals, event: str, *words: str) -> int:
    """Send a signal after the first line with `event`; return the exit code."""
    process = start(folder, *WORDS, *words)
    assert process.stdout is not None
    assert any(event in line for line in process.stdout)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    return process.returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the video of a run without an interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, _, errors = run(folder, *WORDS, "--seed", "3", "-o", "a.mp4")
    assert code == 0, errors
    assert [file.name for file in folder.iterdir()] == ["a.mp4"]
    return (folder / "a.mp4").read_bytes()


@pytest.mark.parametrize("number", EACH, ids=lambda n: n.name)
def test_repeated_command_finishes_the_same_video(
    tmp_path: Path, uninterrupted: bytes, number: signal.Signals
) -> None:
    words = ["--seed", "3", "-o", "a.mp4"]
    code = interrupt(tmp_path, number, '"step_finished", "step": 2', *words)
    assert code == (-9 if number == signal.SIGKILL else 130)
    # A process that is killed leaves its claim's empty file, which the next run takes over.
    left = [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"]
    assert left == ["a.mp4" + CHECKPOINT_SUFFIX]
    code, out, errors = run(tmp_path, *WORDS, *words)
    assert code == 0, errors
    made = [line for line in out.splitlines() if '"step_finished"' in line]
    # A signal that can be answered costs the step it falls into, a kill those since the last write.
    assert len(made) <= (STEPS - 2 if number == signal.SIGKILL else STEPS - 3)
    assert (tmp_path / "a.mp4").read_bytes() == uninterrupted
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_resume_needs_only_the_checkpoint(tmp_path: Path, uninterrupted: bytes) -> None:
    interrupt(tmp_path, signal.SIGTERM, '"step_finished", "step": 0', "--seed", "3", "-o", "a.mp4")
    file = "a.mp4" + CHECKPOINT_SUFFIX
    code, _, errors = run(tmp_path, "generate", "--resume", file, "--steps", "9")
    assert code == 2
    assert "--steps cannot be changed" in errors
    code, _, errors = run(tmp_path, "generate", "--resume", file)
    assert code == 0, errors
    assert "1 of 6 steps are done" in errors
    assert (tmp_path / "a.mp4").read_bytes() == uninterrupted


def test_prompt_file_continues_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    words = [*WORDS[:1], *WORDS[3:], "--prompt-file", "p.txt"]
    process = start(tmp_path, *words)
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += '"step_finished", "step": 2' in line
        if seen == 2:
            break
    process.kill()
    process.communicate(timeout=60)
    code, out, errors = run(tmp_path, *words)
    assert code == 0, errors
    assert "0000-a-red-circle.mp4 exists already" in out
    assert "2 of 6 steps are done" in out
    assert len(list(tmp_path.glob("*.mp4"))) == 2
    assert list(tmp_path.glob("*" + CHECKPOINT_SUFFIX)) == []


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--resume", "gone"], 2, "No such file"),
        (["--resume", "junk"], 4, "damaged"),
        (["--resume", "junk", "-C", "a.mp4"], 2, "exclude each other"),
        (["--resume", "junk", "--prompt-file", "a"], 2, "exclude each other"),
        (["-p", "x", "--checkpoint-every", "0"], 2, "--checkpoint-every"),
    ],
    ids=str,
)
def test_resume_errors_are_one_line(tmp_path: Path, words: list[str], code: int, says: str) -> None:
    (tmp_path / "junk").write_bytes(b"junk")
    found, _, errors = run(tmp_path, "generate", *words)
    assert found == code
    assert len(errors.strip().splitlines()) == 1
    assert says in errors


def test_edit_offers_no_resume(tmp_path: Path) -> None:
    code, out, _ = run(tmp_path, "edit", "--help")
    assert code == 0
    assert "--checkpoint-every" not in out
    assert "--resume" not in out
