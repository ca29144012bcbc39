"""Interrupts: what is left, and the command that goes on, which works as it is printed."""

from __future__ import annotations

import os
import shlex
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from mlx_sora.cli import interrupts
from mlx_sora.cli.main import main
from mlx_sora.cli.progress import QuietRenderer
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.events import Event, RequestStarted, StageStarted, StepFinished
from mlx_sora.video.reader import read_video

WORDS = ["-p", "it's a red circle", "--steps", "3", "--width", "32", "--height", "32"]
WORDS += ["--model", "shapes", "-s", "4", "--quiet"]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """List that holds the event at which Ctrl-C is pressed: a type, and the number of it."""
    when: list[object] = []
    real = QuietRenderer.handle

    def handle(self: QuietRenderer, event: Event) -> None:
        if when and isinstance(event, when[0]):  # type: ignore[arg-type]
            when[1] -= 1  # type: ignore[operator]
            if when[1] == 0:
                raise KeyboardInterrupt
        real(self, event)

    monkeypatch.setattr(QuietRenderer, "handle", handle)
    return when


def test_the_printed_command_goes_on(
    folder: Path, interrupt: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    output = "it's $5.mp4"
    assert main(["generate", *WORDS, "-o", "whole.mp4"]) == 0
    interrupt[:] = [StepFinished, 2]
    assert main(["generate", *WORDS, "-o", output, "--checkpoint-every", "5"]) == 130
    error = capsys.readouterr().err.strip()
    start, _, command = error.partition(" Go on: ")
    assert start == f"error: interrupted. {output}.checkpoint.safetensors has the steps so far."
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "mlx_sora"]
    # Interrupted again before another step, the same file goes on.
    interrupt[:] = [StageStarted, 1]
    assert main([*words[3:], "--quiet"]) == 130
    assert capsys.readouterr().err.strip().endswith(command)
    interrupt.clear()
    assert main(words[3:]) == 0
    assert "2 of 3 steps are done" in capsys.readouterr().err
    assert sorted(os.listdir(folder)) == [output, "whole.mp4"]
    assert (read_video(output, 17).frames == read_video("whole.mp4", 17).frames).all()


def test_without_a_checkpoint_the_next_one_is_advised(
    folder: Path, interrupt: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt[:] = [StepFinished, 1]
    assert main(["generate", *WORDS]) == 130
    error = capsys.readouterr().err
    assert error.startswith("error: interrupted. Nothing was written.")
    flags = error[error.index("--") :].split()
    assert flags == ["--checkpoint-every", "5"]
    interrupt[:] = [StageStarted, 1]
    assert main(["generate", *WORDS, *flags]) == 130
    assert "No step was finished. Nothing was written." in capsys.readouterr().err
    assert os.listdir(folder) == []


@pytest.mark.usefixtures("pipeline")
def test_of_several_videos_those_that_are_done_are_counted(
    folder: Path, interrupt: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt[:] = [RequestStarted, 3]
    assert main(["generate", "-p", "a", "-s", "1", "2", "3", "--quiet"]) == 130
    expected = "interrupted. 2 of 3 videos are done. Of the next one, nothing was written."
    assert expected in capsys.readouterr().err
    assert len(os.listdir(folder)) == 2


def test_several_ranks_and_prompt_files_go_on_by_the_same_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.mp4.checkpoint.safetensors").touch()
    requests = [GenerationRequest("a", output="a.mp4", checkpoint_every=1)]
    explain = partial(interrupts.interrupted_run, requests, 0, None)
    assert "--resume" in explain(repeat=False)
    assert "The same command goes on" in explain(repeat=True)
    monkeypatch.setattr(interrupts, "launch_backend", lambda: "ring")
    assert "The same command goes on" in explain(repeat=False)


def test_an_edit_writes_nothing(
    folder: Path, interrupt: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save("a.png")
    interrupt[:] = [StageStarted, 1]
    words = ["--source-prompt", "black", "-p", "red", "--steps", "2", "--model", "shapes"]
    assert main(["edit", "a.png", *words, "--quiet"]) == 130
    assert "interrupted. Nothing was written." in capsys.readouterr().err
    assert os.listdir(folder) == ["a.png"]
