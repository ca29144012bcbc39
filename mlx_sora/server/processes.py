"""The worker of a job as the server sees it: its process, its progress, and how it is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil

from mlx_sora.errors import printable
from mlx_sora.server.store import Job
from mlx_sora.server.task import EDIT
from mlx_sora.utils.json import parse_object

WORKER = (sys.executable, "-m", "mlx_sora.server.worker")

#: Longest line of a worker, and of its last words on standard error, in bytes.
_MAX_LINE, _MAX_ERROR = 1 << 20, 4096

#: Seconds by which the start time of one process may differ: the system's clock can be set.
_SAME_START = 2.0

#: Steps whose mean is the speed.
_STEPS = 8

#: Stages that each clip has.
_PER_CLIP = ("denoise", "decode")


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
    """Progress of one run of a job.

    Operations of the plan weigh the stages. Seconds follow from the last steps, before the first
    from the plan.
    """

    def __init__(self, job: Job) -> None:
        plan = job.plan
        self._shares = dict(plan.shares) if plan and plan.shares else {"denoise": 1.0}
        self._planned = plan.seconds if plan else None
        self._clips = max(1, int(job.task.options.get("loop", 1)))
        self._steps = (plan.steps if plan else 0) * (2 if job.task.kind == EDIT else 1)
        self._clip, self._seen = 0, 0
        self._stage, self._done = "", 0.0
        self._recent: deque[float] = deque(maxlen=_STEPS)
        self._peak = job.peak_memory or 0

    def handle(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Return what an event changes: values by the names of Job's fields."""
        name = event["event"]
        if name == "stage_started":
            if event["stage"] == "denoise":
                self._clip, self._seen = self._seen, self._seen + 1
            self._stage, self._done = event["stage"], 0.0
        elif name == "stage_progress":
            self._done = event["done"] / max(1, event["total"])
        elif name == "step_finished":
            self._steps = event["total"]
            self._done = (event["step"] + 1) / max(1, event["total"])
            self._recent.append(event["seconds"])
        elif name == "stage_finished":
            self._done = 1.0
            self._peak = max(self._peak, event["peak_rss"])
        else:
            return {}
        changes: dict[str, Any] = {
            "stage": self._stage,
            "steps": self._steps * self._clips,
            "progress": round(self._progress(), 4),
            "seconds_left": self._seconds_left(),
            "peak_memory": self._peak or None,
        }
        if self._stage == "denoise":
            changes["step"] = round(self._steps * (self._clip + self._done))
        return changes

    def _share(self, stage: str) -> float:
        return self._shares.get(stage, 0.0) / (self._clips if stage in _PER_CLIP else 1)

    def _behind(self) -> float:
        """Share of the stages that are finished."""
        order = ("encode", "read", "denoise", "decode")
        now = order.index(self._stage) if self._stage in order else 0
        found = sum(self._share(stage) for stage in order[:now])
        if self._clip > 0:  # the stages before, and the clips
            found += self._clip * sum(self._share(stage) for stage in _PER_CLIP)
        return found

    def _progress(self) -> float:
        whole = sum(self._shares.values()) or 1.0
        return min(1.0, (self._behind() + self._done * self._share(self._stage)) / whole)

    def _seconds_left(self) -> float | None:
        progress = self._progress()
        left = 1 - progress
        if self._recent and self._share("denoise") > 0:
            whole = sum(self._shares.values())
            mean = sum(self._recent) / len(self._recent)
            # Seconds of the whole run, if all its operations are as fast as the steps.
            seconds = left * mean * self._steps / (self._share("denoise") / whole)
        elif self._planned is not None:
            seconds = left * self._planned
        else:
            return None
        return round(seconds, 1)
