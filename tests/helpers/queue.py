"""A server's queue with programs that take milliseconds, and waiting for what it does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from mlx_sora.server.queue import JobQueue, Limits, Programs
from mlx_sora.server.store import Job
from mlx_sora.server.task import Task

_HERE = Path(__file__).parent

#: Stand-ins for the worker and the helper.
FAKES = Programs(
    worker=(sys.executable, "-S", str(_HERE / "fake_worker.py")),
    helper=(sys.executable, "-S", str(_HERE / "fake_helper.py")),
    available=lambda: 10**9,
)


def open_queue(folder: Path, limits: Limits | None = None, programs: Programs = FAKES) -> JobQueue:
    """Return a queue that works."""
    queue = JobQueue(folder, limits or Limits(), programs)
    queue.start()
    return queue


def task(prompt: str = "a red circle", **options: object) -> Task:
    """Return a task of one frame."""
    return Task(options={"prompt": prompt, "num_frames": 1, **options})


def wait(condition: Callable[[], object], seconds: float = 20) -> None:
    """Return once the condition holds; fail if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def ended(queue: JobQueue, job: Job, seconds: float = 60) -> Job:
    """Return a job when it neither waits nor runs."""
    wait(lambda: queue.get(job.id).state not in ("queued", "running"), seconds)
    return queue.get(job.id)
