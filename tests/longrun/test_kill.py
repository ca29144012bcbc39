"""Processes that die in the middle of their work: the same command finishes the same video.

Each is ended at a random moment of a stage, whose length was measured before; what it leaves is
looked at; then the same command is given again.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mlx_sora.video.output_path import CHECKPOINT_SUFFIX
from tests.longrun.table import Fault

STEPS, EVERY = 8, 3
WORDS = ["generate", "-p", "a red circle", "--seed", "3", "--steps", str(STEPS)]
WORDS += ["--no-embed-metadata", "--checkpoint-every", str(EVERY), "--json-events"]

#: Kinds of output, and what their commands say besides.
KINDS = {
    "mp4": ["-o", "a.mp4"],
    "pictures": ["-o", "a/"],
    "two clips": ["-o", "a.mp4", "--loop", "2", "--num-frames", "34"],
}
#: Stages to die in, and how often.
KILLS = [
    *(("mp4", "encode", 6), ("mp4", "denoise", 10), ("mp4", "decode", 6), ("mp4", "write", 6)),
    *(("pictures", "decode", 4), ("pictures", "write", 6)),
    *(("two clips", "denoise", 6), ("two clips", "decode", 6)),
]
INTERRUPTS = [
    *(("mp4", "denoise", 5), ("mp4", "decode", 2)),
    *(("pictures", "write", 2), ("two clips", "denoise", 3)),
]


@dataclass
class Seen:
    """What a process told, line by line with seconds since its start; its exit code."""

    events: list[tuple[float, dict[str, object]]] = field(default_factory=list)
    code: int = 0
    errors: str = ""

    @property
    def steps(self) -> int:
        """Steps finished."""
        return sum(event["event"] == "step_finished" for _, event in self.events)

    def moments(self, stage: str) -> list[tuple[float, float]]:
        """Beginning and end of the stage, each time it came; writing is what follows all stages."""
        if stage == "write":
            ends = [at for at, event in self.events if event["event"] == "stage_finished"]
            return [(ends[-1], self.events[-1][0])]
        times = {
            name: [
                at
                for at, event in self.events
                if event["event"] == f"stage_{name}" and event["stage"] == stage
            ]
            for name in ("started", "finished")
        }
        return list(zip(times["started"], times["finished"], strict=True))


@dataclass(frozen=True)
class End:
    """A signal, some seconds after a stage has begun for the n-th time."""

    number: signal.Signals
    stage: str
    time: int
    delay: float

    def arrives(self, seen: Seen) -> bool:
        """Whether the last event begins the wait."""
        event = seen.events[-1][1]
        name, stage = ("started", self.stage) if self.stage != "write" else ("finished", "decode")
        wanted = {"event": f"stage_{name}", "stage": stage}
        alike = [e for _, e in seen.events if wanted.items() <= e.items()]
        return wanted.items() <= event.items() and len(alike) == self.time + 1


def run(folder: Path, words: list[str], end: End | None = None) -> Seen:
    """One process, ended as `end` says."""
    seen, began = Seen(), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_sora", *words],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        seen.events.append((time.monotonic() - began, json.loads(line)))
        if end is not None and end.arrives(seen):
            time.sleep(end.delay)
            process.send_signal(end.number)
    seen.errors = process.stderr.read()
    seen.code = process.wait(timeout=60)
    return seen


def content(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden, by its path in `folder`."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in files
        if not file.name.startswith(".")
    }


@pytest.fixture(scope="module", params=KINDS)
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Seen, dict[str, bytes]]:
    """A kind of output, the run that nothing happened to, and its files."""
    folder = tmp_path_factory.mktemp("whole")
    seen = run(folder, [*WORDS, *KINDS[request.param]])
    assert seen.code == 0, seen.errors
    return request.param, seen, content(folder)


def cases(
    kind: str, seen: Seen, plan: list[tuple[str, str, int]], *numbers: signal.Signals
) -> Iterator[End]:
    """Random moments in the stages of a plan, the same in every run of the tests."""
    for number in numbers:
        draw = random.Random(f"{kind} {number}")
        for _, stage, count in [item for item in plan if item[0] == kind]:
            for _ in range(count):
                moments = seen.moments(stage)
                time_ = draw.randrange(len(moments))
                begin, end = moments[time_]
                yield End(number, stage, time_, draw.uniform(0, end - begin))


def end_by_signal(folder: Path, words: list[str], end: End) -> Seen:
    """End one process, by an earlier signal if it was faster: what does not land counts nothing."""
    for _ in range(10):
        seen = run(folder, words, end)
        if seen.code != 0:
            break
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        end = replace(end, delay=end.delay / 2)
    # The shell's code of an interrupt, or, while the interpreter starts or ends, the signal itself.
    landed = {-end.number} if end.number == signal.SIGKILL else {130, -end.number}
    assert seen.code in landed, seen.errors
    assert seen.errors.count("\n") <= (end.number != signal.SIGKILL) + 1
    return seen


def check(folder: Path, kind: str, files: dict[str, bytes], end: End) -> int:
    """End one process and give its command again; how many steps were made twice."""
    words = [*WORDS, *KINDS[kind]]
    broken = end_by_signal(folder, words, end)
    assert "Traceback" not in broken.errors
    left = content(folder)
    finals = {name: data for name, data in left.items() if not name.endswith(CHECKPOINT_SUFFIX)}
    assert finals.items() <= files.items(), "a broken file under a final name"
    again = run(folder, words)
    if finals == files:  # the video was finished, the process was not
        assert again.code == 2
        return 0
    assert again.code == 0, again.errors
    assert content(folder) == files
    assert list(folder.rglob(".*")) == []
    total = STEPS * (2 if kind == "two clips" else 1)
    return broken.steps + again.steps - total


def test_a_kill_loses_nothing(
    whole: tuple[str, Seen, dict[str, bytes]], tmp_path: Path, fault: Fault
) -> None:
    kind, seen, files = whole
    for number, end in enumerate(cases(kind, seen, KILLS, signal.SIGKILL)):
        (tmp_path / str(number)).mkdir()
        assert check(tmp_path / str(number), kind, files, end) <= EVERY, end
    for _, stage, count in [item for item in KILLS if item[0] == kind]:
        result = f"all landed; same bytes, at most {EVERY} steps made again"
        fresh = "all landed; begun anew, same bytes"
        fault("SIGKILL", f"{stage}, {kind}", count, 0, fresh if stage == "encode" else result)


def test_an_interrupt_loses_the_step_it_falls_into(
    whole: tuple[str, Seen, dict[str, bytes]], tmp_path: Path, fault: Fault
) -> None:
    kind, seen, files = whole
    signals = signal.SIGINT, signal.SIGTERM
    plan = list(cases(kind, seen, INTERRUPTS, *signals))
    for number, end in enumerate(plan):
        (tmp_path / str(number)).mkdir()
        assert check(tmp_path / str(number), kind, files, end) <= 0, end
    for _, stage, count in [item for item in INTERRUPTS if item[0] == kind]:
        for each in signals:
            result = "all landed; same bytes, no finished step again"
            fault(each.name, f"{stage}, {kind}", count, 0, result)
