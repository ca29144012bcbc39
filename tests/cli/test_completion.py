"""The Tab key: what a shell is offered for an unfinished line, and hints for mistyped words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_sora.cli.completion import SHELLS
from mlx_sora.cli.main import main

#: Completes lines as a shell asks. In a process of its own: argcomplete takes files 8 and 9.
COMPLETE = """
import io, json, os, sys
from mlx_sora.cli.completion import complete_words
from mlx_sora.cli.main import build_parser

class Exited(BaseException):
    pass

def leave(code):
    raise Exited

def complete(line):
    os.environ |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "|", "COMP_LINE": line}
    os.environ["COMP_POINT"] = str(len(line))
    stream = io.StringIO()
    try:
        complete_words(build_parser(), output_stream=stream, exit_method=leave)
    except Exited:
        return [word.strip() for word in stream.getvalue().split("|") if word]

print(json.dumps([complete(line) for line in json.loads(sys.argv[1])]))
"""


def test_completions(folder: Path) -> None:
    (folder / "cat.mp4").touch()
    (folder / "own").mkdir()
    expected = {
        "gen": ["generate"],
        "generate --prev": ["--preview-every"],
        "generate --sampler r": ["rflow"],
        "generate --model s": ["shapes"],
        "generate --model o": ["opensora-1.2", "opensora-1.2-8bit", "opensora-1.2-4bit", "own/"],
        "doctor opensora-1.2-8": ["opensora-1.2-8bit"],
        "generate --device-profile ipad-8": ["ipad-8gb"],
        "generate --resolution 14": ["144p"],
        "generate -C c": ["cat.mp4"],
        "generate --image c": ["cat.mp4"],
        "generate --prompt c": [],
        "generate --steps ": [],
    }
    lines = json.dumps([f"mlx_sora {line}" for line in expected])
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE, lines], capture_output=True, text=True, check=True
    )
    assert dict(zip(expected, json.loads(done.stdout), strict=True)) == expected


def test_a_real_shell_completes(folder: Path) -> None:
    script = """
        eval "$(mlx_sora completion bash)"
        COMP_LINE="mlx_sora cali" COMP_POINT=13 COMP_TYPE=9
        function_name=$(complete -p mlx_sora | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        $function_name mlx_sora cali mlx_sora
        echo "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "calibrate", done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_the_code_of_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    code = capsys.readouterr().out
    mark = {
        "bash": "complete -o",
        "zsh": "#compdef mlx_sora",
        "fish": "complete --command mlx_sora",
    }
    assert mark[shell] in code


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("genrate -p a", "Did you mean generate?"),
        ("Generate -p a", "Did you mean generate?"),
        ("generate -p a --sampler midpont", "Did you mean midpoint?"),
        ("generate -p a --num_frames 3", "Did you mean --num-frames?"),
        ("zzz", "See mlx_sora --help."),
    ],
)
def test_mistyped_words(line: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.endswith(hint)
