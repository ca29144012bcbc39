"""One of two ranks under mlx.launch ends at a random moment: it is named, and nothing is lost.

Either rank, in every stage: killed, crashed, stopped, interrupted, or with an error. Then a single
process finishes the video.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from mlx_sora.video.reader import read_video
from tests.helpers.ranks import Launch, Launched, launch, launching
from tests.longrun.table import Fault

WORDS = ["generate", "-p", "a red circle", "--seed", "3", "--steps", "12", "--num-frames", "34"]
WORDS += ["-o", "a.webp", "--checkpoint-every", "3", "--json-events"]

#: The command line; SIGUSR1 raises an error in its main thread.
PROGRAM = """
import signal, sys
from mlx_sora.cli.main import main

def broken(number, frame):
    raise RuntimeError("broken by a test")

signal.signal(signal.SIGUSR1, broken)
sys.exit(main())
"""

STAGES = ("start", "encode", "denoise", "decode", "write")

#: Signal: what it does, times per rank and stage, and what the line says that names the rank.
ENDS = {
    signal.SIGKILL: ("SIGKILL", 2, "was killed"),
    signal.SIGABRT: ("crash", 1, "crashed: Aborted"),
    signal.SIGSTOP: ("SIGSTOP", 1, "sent no heartbeat"),
    signal.SIGTERM: ("SIGTERM", 1, "was interrupted"),
    signal.SIGUSR1: ("error", 1, "ended with an error"),
}

#: Seconds until all have ended: silence of a stopped rank is noticed after 30.
PATIENCE = 60


@dataclass(frozen=True)
class Whole:
    """Frames of an undisturbed run, and the seconds that each stage takes."""

    frames: np.ndarray
    seconds: dict[str, float]


def moment(stage: str) -> tuple[str, dict[str, str]] | None:
    """Event that begins a stage; None for the start."""
    if stage == "start":
        return None
    kind, name = ("finished", "decode") if stage == "write" else ("started", stage)
    return f"stage_{kind}", {"stage": name}


def events(text: str) -> Iterator[dict[str, str]]:
    """Events that rank 0 has printed."""
    for line in text.splitlines():
        if line.startswith("{") and line.endswith("}"):
            yield json.loads(line)


def wait_for(stage: str, running: Launch) -> bool:
    """Wait until the stage begins; for the start, until each rank looks for the others."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not running.wait(0):
        found = moment(stage)
        if found is None:
            pids = running.pids().values()
            if len(pids) == 2 and all(psutil.Process(pid).net_connections() for pid in pids):
                return True
        elif any(
            event["event"] == found[0] and found[1].items() <= event.items()
            for event in events(running.stdout.read_text())
        ):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The undisturbed run, made by two ranks."""
    folder, began = tmp_path_factory.mktemp("whole"), {}
    with launching(2, ["-c", PROGRAM, *WORDS], cwd=folder) as running:
        for stage in STAGES:
            assert wait_for(stage, running), running.stderr.read_text()
            began[stage] = time.monotonic()
        assert running.wait(PATIENCE)
        ends = [*list(began.values())[1:], time.monotonic()]
    seconds = {stage: end - began[stage] for stage, end in zip(STAGES, ends, strict=True)}
    return Whole(read_video(folder / "a.webp").frames, seconds)


def end_rank(
    folder: Path, rank: int, stage: str, number: signal.Signals, delay: float
) -> tuple[Launched, float] | None:
    """Send the signal; return what was printed, and seconds until all had ended.

    None if the run was over before.
    """
    with launching(2, ["-c", PROGRAM, *WORDS], cwd=folder) as running:
        if not wait_for(stage, running):
            return None
        time.sleep(delay)
        pid = running.pids().get(rank)
        if pid is None or "finished" in [e["event"] for e in events(running.stdout.read_text())]:
            return None
        os.kill(pid, number)
        began = time.monotonic()
        assert running.wait(PATIENCE), f"hangs: {running.stderr.read_text()}"
        stderr = running.stderr.read_text()
        codes = {int(r): int(c) for r, c in re.findall(r"rank (\d) exited with code (\S+)", stderr)}
        made = Launched(running.stdout.read_text(), stderr, [codes.get(0, 0), codes.get(1, 0)])
        return (made, time.monotonic() - began) if any(made.codes) else None


def check(folder: Path, whole: Whole, made: Launched, rank: int, cause: str) -> None:
    """Check the line that names the rank, what is left, and what one process makes of it."""
    assert made.codes[rank] != 0, f"the signal came too late: {made}"
    named = f"error: Rank {rank} on {socket.gethostname()} "
    assert [line for line in made.errors if line.startswith(named)], made
    assert all(line.startswith(named) for line in made.errors), made
    if rank or "interrupted" not in cause:
        assert "Traceback" not in made.stderr, made
    early = f"{named}had not connected when"
    assert made.errors[0].startswith((named + cause, early)), made
    output = folder / "a.webp"
    if not output.exists():
        again = launch(1, ["-m", "mlx_sora", *WORDS], cwd=folder)
        assert again.codes == [0], again.stderr
    frames = read_video(output).frames
    # One process rounds differently, and WebP is lossy.
    assert np.abs(frames.astype(int) - whole.frames).mean() < 0.5


@pytest.mark.parametrize("number", ENDS, ids=lambda number: ENDS[number][0])
def test_a_lost_rank_is_named_and_nothing_is_lost(
    whole: Whole, number: signal.Signals, tmp_path: Path, fault: Fault
) -> None:
    name, times, cause = ENDS[number]
    draw = random.Random(number)
    for stage in STAGES:
        longest = 0.0
        for rank in (0, 1) * times:
            found, tries = None, 0
            while found is None:  # a stage that was shorter than expected: try again, sooner
                folder = tmp_path / f"{stage}-{rank}-{draw.random()}"
                folder.mkdir()
                delay = draw.uniform(0, whole.seconds[stage] * 0.8**tries)
                found = end_rank(folder, rank, stage, number, delay)
                tries += 1
                assert tries < 20
            made, seconds = found
            check(folder, whole, made, rank, cause)
            longest = max(longest, seconds)
        result = f"named, all ended within {longest:.0f} s, finished by one process"
        fault(f"{name} of one of two ranks", stage, 2 * times, 0, result)
