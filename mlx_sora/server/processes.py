"""The worker of a job as the server sees it: its process, its progress, and how it is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

import psutil

from mlx_sora.errors import printable
from mlx_sora.runtime.events import (
    PlannedStage,
    RunPlanned,
    StageFinished,
    StageProgress,
    StageStarted,
    StepFinished,
)
from mlx_sora.runtime.progress import RunProgress
from mlx_sora.server.store import Job
from mlx_sora.utils.json import parse_object

WORKER = (sys.executable, "-m", "mlx_sora.server.worker")

#: Longest line of a worker, and of its last words on standard error, in bytes.
_MAX_LINE, _MAX_ERROR = 1 << 20, 4096

#: Seconds by which the start time of one process may differ: the system's clock can be set.
_SAME_START = 2.0

#: Events that progress follows from, by their names.
_PROGRESS: Mapping[str, Any] = {
    "stage_started": StageStarted,
    "stage_progress": StageProgress,
    "step_finished": StepFinished,
    "stage_finished": StageFinished,
}


class WorkerProcess:
    """A process that waits for the words of its command, and then carries it out.

    It runs in a session of its own: Ctrl-C in the server's terminal does not reach it.
    """

    def __init__(self, program: Sequence[str] = WORKER) -> None:
        """Start it. Raises OSError."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )

    @property
    def identity(self) -> tuple[int, float]:
        """Number and start time of the process."""
        pid = self._process.pid
        try:
            return pid, psutil.Process(pid).create_time()
        except psutil.Error:
            return pid, time.time()

    def send(self, words: Sequence[str]) -> None:
        """Tell the process what to do."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended, which `wait` tells
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            self._process.stdin.flush()

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of the command until it ends."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline(_MAX_LINE):
            with suppress(ValueError):
                event = parse_object(line)
                if isinstance(event.get("event"), str):
                    yield event

    def interrupt(self) -> None:
        """Interrupt the command, which then writes its checkpoint."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def wait(self) -> tuple[int, str]:
        """Return exit code, negative for a signal, and the last line on standard error."""
        code = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()
        with self._errors as errors:
            errors.seek(max(0, os.fstat(errors.fileno()).st_size - _MAX_ERROR))
            lines = errors.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return code, printable(last.removeprefix("error: "))


def end_process(identity: tuple[int, float] | None, grace: float = 5) -> None:
    """End the worker that an earlier server has left, if it is still there.

    identity: number and start time. grace: seconds for it to write its checkpoint, since it
    notices by itself that its server is gone.
    """
    if identity is None:
        return
    pid, started = identity
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > _SAME_START:
            return  # another one has its number
        if not _ends_within(process, grace):
            process.kill()
            _ends_within(process, grace)


def _ends_within(process: psutil.Process, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


class Progress:
    """Progress of one run of a job, as the fields of Job have it."""

    def __init__(self, job: Job) -> None:
        self._run = RunProgress()
        self._planned = job.plan.seconds if job.plan else None
        self._peak = job.peak_memory or 0

    def handle(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Return what an event changes: values by the names of Job's fields."""
        name = event["event"]
        if name == "run_planned":
            stages = tuple(PlannedStage(**stage) for stage in event["stages"])
            self._run.handle(RunPlanned(stages))
            return {}
        if name not in _PROGRESS:
            return {}
        kind = _PROGRESS[name]
        known = {field.name: event.get(field.name) for field in fields(kind)}
        self._run.handle(kind(**known))
        if name == "stage_finished":
            self._peak = max(self._peak, event["peak_rss"])
        run, left = self._run, self._run.seconds_left
        if left is None and self._planned is not None:
            left = self._planned * (1 - run.fraction)
        changes: dict[str, Any] = {
            "stage": run.stage,
            "progress": round(run.fraction, 4),
            "seconds_left": None if left is None else round(left, 1),
            "peak_memory": self._peak or None,
        }
        if run.stage == "denoise":
            changes["step"] = run.total * run.clip + run.done
            changes["steps"] = run.total * run.clips
        return changes
