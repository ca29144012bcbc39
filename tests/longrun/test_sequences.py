"""Sequences of pictures whose process ends while they are written or renamed: all or nothing.

Each process is ended at a random moment of either, on a disk that is made slow. What is there then
is looked at, and the same command is given again.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mlx_sora.video.output_path import CHECKPOINT_SUFFIX
from tests.longrun.table import Fault

PROGRAM = Path(__file__).parents[1] / "helpers" / "programs" / "slow_pictures.py"
FRAMES = 34
WORDS = ["generate", "-p", "a red circle", "--seed", "3", "--steps", "1", "--num-frames"]
WORDS += [str(FRAMES), "--width", "32", "--height", "32", "--no-embed-metadata", "--json-events"]
WORDS += ["-o", "f_%02d.png"]

#: Options of each kind of run; how many ends in writing and in renaming count, by each signal.
KINDS = {
    "new": [],
    "with a checkpoint": ["--checkpoint-every", "1"],
    "over old ones": ["--overwrite"],
}
SIGNALS = {signal.SIGKILL: (4, 6), signal.SIGTERM: (2, 3), signal.SIGINT: (2, 3)}


@dataclass
class Seen:
    """What a process printed: its moments in seconds since 1970, its exit code and errors."""

    moments: dict[str, float] = field(default_factory=dict)
    code: int = 0
    errors: str = ""


def run(folder: Path, words: list[str], end: tuple[str, float, signal.Signals] | None) -> Seen:
    """Run one process; end it some seconds after a moment, by a signal."""
    seen = Seen()
    program = ["-m", "mlx_sora"] if end is None and "slow" not in words else [str(PROGRAM)]
    words = [word for word in words if word != "slow"]
    process = subprocess.Popen(
        [sys.executable, *program, *words],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "moment":
            seen.moments[event["name"]] = event["time"]
            if end is not None and event["name"] == end[0]:
                time.sleep(max(0.0, event["time"] + end[1] - time.time()))
                seen.moments["signal"] = time.time()
                process.send_signal(end[2])
    assert process.stderr is not None
    seen.errors = process.stderr.read()
    seen.code = process.wait(timeout=120)
    return seen


def content(folder: Path) -> dict[str, bytes]:
    """Return the pictures in a folder."""
    return {file.name: file.read_bytes() for file in folder.glob("f_*.png")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, float]]:
    """Return the pictures of a run that nothing happened to, and how long each phase took."""
    folder = tmp_path_factory.mktemp("whole")
    seen = run(folder, ["slow", *WORDS], None)
    assert seen.code == 0, seen.errors
    at = seen.moments
    lengths = {
        "writing": at["renaming"] - at["writing"],
        "renaming": at["renamed"] - at["renaming"],
    }
    pictures = content(folder)
    assert len(pictures) == FRAMES
    return pictures, lengths


def landed(seen: Seen, phase: str) -> bool:
    """Return True if the signal came within the phase: it began before, and ended after."""
    end = {"writing": "renaming", "renaming": "renamed"}[phase]
    return seen.moments["signal"] < seen.moments.get(end, float("inf"))


def check(
    folder: Path, words: list[str], old: dict[str, bytes], new: dict[str, bytes], seen: Seen
) -> None:
    """Raise unless the pictures are the old or the new ones, and the same command ends it."""
    assert "Traceback" not in seen.errors
    left = content(folder)
    if seen.code != -signal.SIGKILL:
        assert left in (old, new)
        hidden = [file.name for file in folder.iterdir() if file.name.startswith(".")]
        assert hidden == []
    elif left not in (old, new):
        assert "f_00.png" not in left, "an unfinished sequence looks finished"
    again = run(folder, words, None)
    if left == new and "--overwrite" not in words:
        assert again.code == 2
    else:
        assert again.code == 0, again.errors
    assert content(folder) == new
    rest = [file.name for file in folder.iterdir() if file.name not in new]
    assert [name for name in rest if not name.endswith(CHECKPOINT_SUFFIX)] == []
    assert not rest or left == new


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_is_all_or_nothing(
    whole: tuple[dict[str, bytes], dict[str, float]],
    tmp_path: Path,
    fault: Fault,
    kind: str,
    number: signal.Signals,
) -> None:
    new, lengths = whole
    draw, words = random.Random(f"{kind} {number}"), [*WORDS, *KINDS[kind]]
    old = dict.fromkeys([*new, f"f_{FRAMES}.png"], b"old") if kind == "over old ones" else {}
    for phase, count in zip(lengths, SIGNALS[number], strict=True):
        inside, attempts = 0, 0
        while inside < count and attempts < 4 * count:  # only those that land count
            folder = tmp_path / f"{phase}{attempts}"
            folder.mkdir()
            for name, data in old.items():
                (folder / name).write_bytes(data)
            seen = run(folder, words, (phase, draw.uniform(0, lengths[phase]), number))
            inside += landed(seen, phase)
            attempts += 1
            check(folder, words, old, new, seen)
        result = "all frames or none, then the same; landed within it"
        fault(number.name, f"{phase} of pictures, {kind}", inside, 0, result)
        assert inside == count
