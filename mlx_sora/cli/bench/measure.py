"""Measure one generation in a new process, from outside and through its events."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mlx_sora.errors import MlxSoraError
from mlx_sora.runtime.footprint import peak_footprint
from mlx_sora.utils.leftovers import temporary_folder

#: Seconds until an interrupted child is killed. It removes its partial files before.
_KILL_AFTER = 20.0

#: What `Measurement.peak` is on this system.
PEAK = "physical footprint" if platform.system() == "Darwin" else "resident set"


class ChildFailed(MlxSoraError):
    """A generation failed. Carries the message and the exit code of the child process."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Measurement:
    """Seconds and bytes of one finished process.

    seconds: of all stages; stages: of each stage; wall: of the process, with its start.
    peak: of the process; mlx_peak: of MLX's allocator. stream: record of block streaming by stage.
    processor: seconds of the processor that the process used, all threads together.
    """

    seconds: float
    wall: float
    peak: int
    mlx_peak: int
    stages: Mapping[str, float]
    stream: Mapping[str, Mapping[str, Any]]
    processor: float = 0.0


@dataclass
class _ChildMonitor:
    """Collects the events of a child, and its footprint if the system measures one."""

    pid: int
    stages: dict[str, float] = field(default_factory=dict)
    mlx_peak: int = 0
    footprint: int = 0
    error: str = ""

    def handle(self, line: str) -> None:
        # The peak footprint never shrinks, so a look at every event is enough.
        self.footprint = max(self.footprint, peak_footprint(self.pid) or 0)
        try:
            event = json.loads(line)
        except ValueError:
            return
        if event["event"] == "stage_finished":
            self.stages[event["stage"]] = event["seconds"]
            self.mlx_peak = max(self.mlx_peak, event["peak_memory"])
        elif event["event"] == "error":
            self.error = event["message"]


def measure(flags: Sequence[str]) -> Measurement:
    """Run `generate` with these flags in a new process and delete the video.

    Raises ChildFailed. Any other exception ends the child first.
    """
    with temporary_folder() as folder:
        command = [sys.executable, "-m", "mlx_sora", "generate", *flags]
        # The parent keeps the machine awake, if that is wanted.
        command += ["--json-events", "--allow-sleep", "--no-text-cache"]
        command += ["--metadata", "--output", f"{folder}/video"]
        start = time.perf_counter()
        with tempfile.TemporaryFile("w+") as errors, _child(command, errors) as process:
            monitor = _ChildMonitor(process.pid)
            assert process.stdout is not None
            for line in process.stdout:
                monitor.handle(line)
            resident, processor = _wait(process)
            if process.returncode != 0:
                errors.seek(0)
                raise _child_error(process.returncode, monitor.error, errors.read())
        wall = time.perf_counter() - start
        sidecar = json.loads(Path(folder, "video.json").read_text(encoding="utf-8"))
    return Measurement(
        seconds=sum(monitor.stages.values()),
        wall=wall,
        peak=monitor.footprint or resident,
        mlx_peak=monitor.mlx_peak,
        stages=monitor.stages,
        stream=sidecar.get("accelerations", {}).get("ci_dl", {}),
        processor=processor,
    )


@contextmanager
def _child(command: Sequence[str], errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """Start the child, and end it with the block."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
    )
    try:
        yield process
    except BaseException:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(_KILL_AFTER)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        assert process.stdout is not None
        process.stdout.close()


def _wait(process: subprocess.Popen[str]) -> tuple[int, float]:
    """Wait for the child; return its largest resident set in bytes and its processor seconds."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    resident = usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return resident, usage.ru_utime + usage.ru_stime


def _child_error(code: int, message: str, errors: str) -> ChildFailed:
    if code < 0:
        return ChildFailed(f"The generation was killed by signal {-code}; out of memory?", 1)
    lines = errors.strip().splitlines()
    return ChildFailed(message or (lines[-1] if lines else f"exit code {code}"), code)
