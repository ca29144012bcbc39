"""Closed terminals and early Ctrl-C.

Report: DarthSim/overmind#86 (SIGHUP leaves files behind that the user has to clean up by hand).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.commands import IMAGE, generate

RUN = generate(
    "--prompt red --num-frames 51 --steps 50 --seed 1 --checkpoint-every 50 --json-events "
    "--output a.mp4"
)

#: Sets what the program inherits for a signal, then becomes the program.
START = (
    "import os, signal, sys; signal.signal(getattr(signal, sys.argv[1]), getattr(signal, "
    "sys.argv[2])); os.execv(sys.executable, sys.argv[3:])"
)


def run_until_step(folder: Path, number: signal.Signals, inherited: str) -> subprocess.Popen[str]:
    """Send the signal after the third step; return the ended program."""
    command = [sys.executable, "-c", START, number.name, inherited, sys.executable, *RUN]
    child = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    steps = 0
    assert child.stdout is not None
    for line in child.stdout:
        steps += json.loads(line)["event"] == "step_finished"
        if steps == 3:
            child.send_signal(number)
            break
    child.stdout.read()
    child.wait()
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_keeps_the_steps_and_leaves_nothing_hidden(
    tmp_path: Path, number: signal.Signals
) -> None:
    inherited = "default_int_handler" if number == signal.SIGINT else "SIG_DFL"
    child = run_until_step(tmp_path, number, inherited)
    assert child.returncode in (130, -signal.SIGINT)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4.checkpoint.safetensors"]


def test_nohup_goes_on(tmp_path: Path) -> None:
    assert run_until_step(tmp_path, signal.SIGHUP, "SIG_IGN").returncode == 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


#: A run by the Python API, which prints a line after each step.
API = """
import signal, sys
from mlx_sora import GenerationRequest, Pipeline
signal.signal(signal.SIGHUP, signal.SIG_DFL)
options = {"prompt": "red", "steps": 90, "num_frames": 17, "width": 32, "height": 32, "seed": 1}
request = GenerationRequest.from_dict({**options, "checkpoint_every": 90, "output": "a.webp"})
pipe = Pipeline.from_pretrained("shapes")
for event in pipe.stream(request) if sys.argv[1] == "one" else pipe.stream_all([request] * 1):
    print(type(event).__name__, flush=True)
"""


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, "one"), (signal.SIGHUP, "batch")])
def test_signals_end_the_python_api_as_cleanly(
    tmp_path: Path, number: signal.Signals, kind: str
) -> None:
    folder, temporary = tmp_path / "videos", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    child = until_third_step(folder, [sys.executable, "-c", API, kind], temporary)
    child.send_signal(number)
    _, errors = child.communicate()
    assert child.returncode == 128 + number
    assert "Traceback" not in errors
    assert [file.name for file in folder.iterdir()] == ["a.webp.checkpoint.safetensors"]
    assert list(temporary.glob("mlx_sora-*")) == []


def until_third_step(folder: Path, command: list[str], temporary: Path) -> subprocess.Popen[str]:
    """Start a program with its own folder for temporary files; return it after three steps."""
    child = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    seen = 0
    while seen < 3:
        line = child.stdout.readline()
        assert line, child.communicate()[1]
        seen += "StepFinished" in line or "step_finished" in line
    return child


def test_the_next_command_removes_what_a_killed_batch_left(tmp_path: Path) -> None:
    folder, temporary = tmp_path / "videos", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    (folder / "p.txt").write_text("red\nblue\n")
    words = "--prompt-file p.txt --num-frames 17 --width 32 --height 32 --steps 90 --json-events"
    child = until_third_step(folder, [sys.executable, *generate(words)], temporary)
    child.kill()
    child.communicate()
    hidden = {file.suffix for file in folder.iterdir() if file.name.startswith(".")}
    assert hidden == {".lock"}
    assert len(list(temporary.glob("mlx_sora-*/*"))) == 2
    environment = {**os.environ, "TMPDIR": str(temporary)}
    subprocess.run([sys.executable, *IMAGE], cwd=folder, env=environment, check=True)
    assert list(temporary.glob("mlx_sora-*")) == []
    assert sorted(file.name for file in folder.iterdir()) == ["a.png", "p.txt"]


@pytest.mark.parametrize("seconds", [0.08, 0.12, 0.2, 0.3])
def test_ctrl_c_while_the_program_loads_is_no_traceback(tmp_path: Path, seconds: float) -> None:
    command = [sys.executable, *RUN]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=-1, text=True)
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate()
    if child.returncode == 0:
        return  # a library that was just loading has swallowed the signal
    # Before the package is loaded, Python itself answers.
    assert child.returncode in (130, -signal.SIGINT) or "init_import_site" in errors
    assert "Traceback" not in errors or "mlx_sora" not in errors
    assert list(tmp_path.iterdir()) == []
