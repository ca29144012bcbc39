"""--show and --open: pictures as terminals get them, read back; programs that open files."""

from __future__ import annotations

import base64
import io
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_sora.cli.display import (
    _LEVELS,
    block_lines,
    choose_way,
    contact_strip,
    iterm_picture,
    kitty_picture,
    to_png,
)
from mlx_sora.cli.main import main
from tests.helpers.fake_pipeline import FakePipeline

GENERATE = ["generate", "-p", "a", "--seed", "1"]
#: Frames of the fake pipeline are as high as the strip that shows them.
PICTURE = np.random.default_rng(0).integers(0, 256, (61, 90, 3), np.uint8)


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def decode_kitty(text: str) -> np.ndarray:
    """Read pictures as kitty's protocol says: chunks of base64, m=1 on all but the last."""
    commands = re.findall(r"\033_G([^;]*);([^\033]*)\033\\", text)
    keys = [dict(item.split("=") for item in head.split(",")) for head, _ in commands]
    assert {**keys[0], "m": ""} == {"a": "T", "f": "100", "q": "2", "m": ""}
    assert [key["m"] for key in keys] == ["1"] * (len(keys) - 1) + ["0"]
    assert all(len(data) <= 4096 for _, data in commands)
    png = base64.b64decode("".join(data for _, data in commands), validate=True)
    return np.asarray(Image.open(io.BytesIO(png)))


def decode_blocks(text: str) -> np.ndarray:
    """Read the colours of half blocks: uint8 [rows, columns, 3], two rows for a line."""

    def colour(numbers: str) -> list[int]:
        kind, *rest = map(int, numbers.split(";"))
        if kind == 2:
            return rest
        index = rest[0] - 16
        return [_LEVELS[index // 36], _LEVELS[index // 6 % 6], _LEVELS[index % 6]]

    rows = []
    for line in text.splitlines():
        assert line.endswith("▀\033[0m")
        cells = re.findall(r"\033\[38;((?:2(?:;\d+){3})|5;\d+);48;((?:2(?:;\d+){3})|5;\d+)m▀", line)
        rows += [[colour(cell[side]) for cell in cells] for side in (0, 1)]
    return np.array(rows, np.uint8)


def test_kitty_gets_the_picture() -> None:
    text = kitty_picture(to_png(PICTURE))
    assert np.array_equal(decode_kitty(text), PICTURE)


def test_iterm_gets_the_picture() -> None:
    match = re.fullmatch(
        r"\033]1337;File=inline=1;size=(\d+):(.*)\a\n", iterm_picture(to_png(PICTURE))
    )
    assert match is not None
    png = base64.b64decode(match[2], validate=True)
    assert len(png) == int(match[1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), PICTURE)


def test_blocks_are_the_picture() -> None:
    exact = decode_blocks("".join(block_lines(PICTURE, true_colour=True)))
    assert np.array_equal(exact[:61], PICTURE)
    assert not exact[61].any(), "an odd row has a black one below"
    near = decode_blocks("".join(block_lines(PICTURE, true_colour=False)))
    assert np.abs(near[:61].astype(int) - PICTURE).max() <= 48, "half of the widest step, 0 to 95"


def test_a_strip_enlarges_small_frames_and_shrinks_large_ones() -> None:
    small = contact_strip([PICTURE[:60], PICTURE[:60]], 200, enlarge=True)
    assert small.shape == (120, 180 + 2 + 180, 3)
    assert np.array_equal(small[::2, :180:2], PICTURE[:60])
    assert contact_strip([PICTURE] * 3, 45, enlarge=False).shape == (30, 3 * 45 + 2, 3)


@pytest.mark.parametrize(
    ("environment", "way"),
    [
        ("TERM=xterm-kitty KITTY_WINDOW_ID=1", "kitty"),
        ("TERM=xterm-256color KITTY_WINDOW_ID=1", "kitty"),
        ("TERM=xterm-ghostty", "kitty"),
        ("TERM=xterm-256color TERM_PROGRAM=iTerm.app COLORTERM=truecolor", "iterm2"),
        ("TERM=xterm-256color LC_TERMINAL=iTerm2", "iterm2"),
        ("TERM=xterm-256color TERM_PROGRAM=WezTerm", "iterm2"),
        ("TERM=tmux-256color TMUX=/tmp/x KITTY_WINDOW_ID=1 COLORTERM=truecolor", "24bit"),
        ("TERM=xterm-256color TERM_PROGRAM=vscode KITTY_WINDOW_ID=1 COLORTERM=truecolor", "24bit"),
        ("TERM=xterm-256color TERM_PROGRAM=Apple_Terminal", "256"),
        ("TERM=dumb COLORTERM=truecolor", ""),
        ("", ""),
    ],
)
def test_the_way_of_each_terminal(environment: str, way: str) -> None:
    assert choose_way(dict(word.split("=", 1) for word in environment.split())) == way


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.png", "a_%d.png"])
def test_a_video_is_shown_on_a_terminal(
    folder: Path,
    pipeline: FakePipeline,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    for variable in ("TMUX", "TERM_PROGRAM", "LC_TERMINAL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm-kitty")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    length = "1" if name == "a.png" else "17"
    assert main([*GENERATE, "--num-frames", length, "--quiet", "--show", "-o", name]) == 0
    assert capsys.readouterr().out == f"{name}\n", "stdout has only the path"
    shown = decode_kitty(terminal.getvalue())
    height, width, _ = shown.shape
    assert (height > 200, width // height) == (True, 1 if length == "1" else 4)


def test_without_a_terminal_there_is_one_warning(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*GENERATE, "--show", "-o", "a.png", "--num-frames", "1"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "--show" in line]
    assert lines == ["--show needs a terminal that shows colours"]


#: Program that notes what it opens.
OPEN = '#!/bin/sh\necho "$1" >> opened\n'


def install_opener(folder: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / ("open" if sys.platform == "darwin" else "xdg-open")
    file.write_text(program)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        (OPEN, None),
        ("#!/bin/sh\nexit 3\n", "ended with 3"),
        (None, "No such file"),
    ],
)
def test_the_last_file_is_opened(
    folder: Path,
    pipeline: FakePipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    program: str | None,
    problem: str | None,
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    if program is not None:
        install_opener(folder, program, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert main(["generate", "-p", "a", "-s", "1", "2", "--open", "-o", "{seed}.mp4"]) == 0
    warnings = [record.getMessage() for record in caplog.records if "opened" in record.getMessage()]
    if problem is None:
        assert (folder / "opened").read_text() == f"{folder / '2.mp4'}\n"
        assert warnings == []
    else:
        (warning,) = warnings
        assert problem in warning


def test_of_frames_the_first_is_opened(
    folder: Path, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_opener(folder, OPEN, monkeypatch)
    assert main([*GENERATE, "--open", "-o", "frames/"]) == 0
    assert (folder / "opened").read_text() == f"{folder / 'frames' / 'frame_00000.png'}\n"
