"""The worker of a job: it runs, is interrupted, killed, waits for memory, and goes on."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen

import psutil
import pytest

from mlx_sora.errors import MlxSoraError
from mlx_sora.server import scheduler
from mlx_sora.server.processes import end_process
from mlx_sora.server.queue import JobQueue, Programs
from mlx_sora.server.store import Job
from tests.helpers.queue import FAKES, ended, open_queue, task, wait


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    """A queue that works, with a fake worker."""
    opened = open_queue(tmp_path)
    yield opened
    opened.stop()


def text(queue: JobQueue, job: Job) -> str:
    """Return the steps at which the processes began that made a fake video."""
    return queue.content(job.id).read_text()


def running(queue: JobQueue, job: Job, step: int = 1) -> Job:
    """Return a job that has made some steps."""
    wait(lambda: queue.get(job.id).step >= step)
    return queue.get(job.id)


def test_jobs_are_made_in_order(queue: JobQueue) -> None:
    jobs = [queue.submit(task(steps=3)) for _ in range(3)]
    done = [ended(queue, job) for job in jobs]
    assert [job.state for job in done] == ["done"] * 3
    assert [text(queue, job) for job in done] == ["0"] * 3
    ends = [job.finished_at or 0 for job in done]
    assert ends == sorted(ends)
    assert done[0].progress == 1
    assert (done[0].step, done[0].steps, done[0].peak_memory) == (3, 3, 2000)
    names = [event["event"] for event in queue.events(id=jobs[0].id)]
    assert names[:3] == ["job", "job", "stage_started"]
    assert names[-2:] == ["finished", "job"]
    assert "path" not in queue.events(id=jobs[0].id)[-2]


def test_a_cancelled_job_goes_on_from_its_checkpoint(queue: JobQueue) -> None:
    job = queue.submit(task("slow", steps=20))
    running(queue, job, 3)
    assert queue.cancel(job.id).state == "cancelled"
    wait(lambda: not psutil.Process().children() or not queue._scheduler._is_working_on(job.id))
    assert queue.has_checkpoint(queue.get(job.id))
    queue.resume(job.id)
    done = ended(queue, job)
    assert done.state == "done"
    first, second = text(queue, done).split()
    assert first == "0"
    assert 3 <= int(second) < 20


def test_a_job_that_is_resumed_while_its_worker_ends_goes_on(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, resumed = queue._store.get, list[str]()

    def resume_meanwhile(id: str) -> Job:
        job = get(id)
        if job.state == "cancelled" and threading.current_thread() is not threading.main_thread():
            monkeypatch.setattr(queue._store, "get", get)
            queue.resume(id)
            resumed.append(id)
        return job

    job = queue.submit(task("slow", steps=20))
    running(queue, job, 3)
    monkeypatch.setattr(queue._store, "get", resume_meanwhile)
    queue.cancel(job.id)
    wait(lambda: bool(resumed))
    assert ended(queue, job).state == "done"


@pytest.mark.parametrize("prompt", ["fail", "crash"])
def test_a_job_that_is_cancelled_while_its_worker_dies_stays_so(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    get, seen = queue._store.get, list[str]()

    def cancel_meanwhile(id: str) -> Job:
        job = get(id)
        if job.state == "running" and threading.current_thread() is not threading.main_thread():
            monkeypatch.setattr(queue._store, "get", get)
            queue.cancel(id)
            seen.append(id)
        return job

    monkeypatch.setattr(queue._store, "get", cancel_meanwhile)
    job = queue.submit(task(prompt))
    wait(lambda: bool(seen) and not queue._scheduler._is_working_on(job.id))
    assert queue.get(job.id).state == "cancelled"
    assert queue.get(job.id).attempts == 1


def test_a_stopped_server_goes_on(tmp_path: Path) -> None:
    queue = open_queue(tmp_path)
    first, second = queue.submit(task("slow", steps=20)), queue.submit(task())
    running(queue, first, 3)
    queue.stop()
    again = open_queue(tmp_path)
    assert ended(again, first).state == ended(again, second).state == "done"
    assert text(again, first).startswith("0 ")
    assert (again.get(first.id).finished_at or 0) < (again.get(second.id).finished_at or 0)
    again.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_worker_goes_on(queue: JobQueue, number: signal.Signals) -> None:
    job = queue.submit(task("slow", steps=20))
    worker = running(queue, job, 3).worker
    assert worker is not None
    os.kill(worker[0], number)
    assert ended(queue, job).state == "done"
    assert text(queue, job).startswith("0 ")
    assert not list(queue.files.videos.glob("*.unusable"))


def test_a_worker_that_is_always_killed_fails(queue: JobQueue) -> None:
    job = ended(queue, queue.submit(task("crash")))
    assert job.state == "failed"
    assert job.attempts == scheduler._MAX_KILLS
    assert job.error is not None
    assert job.error.message == "The system ended the worker: SIGKILL."
    assert job.error.exit_code == 3


def test_a_failure_is_one_line_without_the_folder(queue: JobQueue) -> None:
    job = ended(queue, queue.submit(task("fail")))
    assert job.state == "failed"
    assert job.error is not None
    assert job.error.message == f"Cannot write {job.output}: no reason. Try again."
    queue.resume(job.id)
    assert ended(queue, job).attempts == 2


def test_a_damaged_checkpoint_is_set_aside(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path, programs=FAKES)
    job = queue.submit(task())
    path = queue.files.checkpoint(job)
    path.write_text("damaged")
    queue.start()
    done = ended(queue, job)
    assert done.state == "done"
    assert "It began again" in done.warnings[0]
    assert path.with_name(path.name + ".unusable").exists()
    queue.stop()


def test_deleting_ends_the_worker_and_removes_the_files(queue: JobQueue) -> None:
    job = queue.submit(task("slow", steps=200))
    worker = running(queue, job).worker
    assert worker is not None
    queue.delete(job.id)
    assert not psutil.pid_exists(worker[0])
    assert list(queue.files.videos.iterdir()) == []
    assert ended(queue, queue.submit(task())).state == "done"
    assert queue.events(id=job.id)[-1]["event"] == "deleted"


def test_a_worker_that_does_not_end_is_killed(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_GRACE", 0.1)
    job = queue.submit(task("wedge", steps=1000))
    worker = running(queue, job).worker
    assert worker is not None
    queue.cancel(job.id)
    wait(lambda: not psutil.pid_exists(worker[0]))
    assert queue.get(job.id).state == "cancelled"


def test_a_job_waits_for_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [100]
    monkeypatch.setattr(scheduler, "_LOOK", 0.01)
    queue = open_queue(tmp_path, programs=replace(FAKES, available=lambda: free[0]))
    job = queue.submit(task())
    wait(lambda: queue.get(job.id).stage == "memory")
    assert queue.get(job.id).state == "queued"
    free[0] = 1000
    assert ended(queue, job).state == "done"
    monkeypatch.setattr(scheduler, "_PATIENCE", 0.1)
    free[0] = 600  # which is enough for the smallest budget
    job = queue.submit(task())
    assert ended(queue, job).state == "done"
    assert "--memory-budget=600" in queue._scheduler._words(job)
    queue.stop()


def test_a_full_disk_loses_nothing(queue: JobQueue) -> None:
    job = queue.submit(task("slow", steps=20))
    running(queue, job)
    writer: sqlite3.Connection = queue._store._writer
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(MlxSoraError, match="the disk is full"):
        queue.submit(task("a red circle " * 10_000))
    wait(lambda: queue.files.video(job).exists())
    writer.execute("PRAGMA max_page_count = 1000000")
    assert ended(queue, job).state == "done"
    assert all(ended(queue, each).state == "done" for each in queue.list(limit=-1))


SERVER = """
import sys, time
from pathlib import Path
from tests.helpers.queue import open_queue, task
queue = open_queue(Path(sys.argv[1]))
job, other = queue.submit(task("slow", steps=40)), queue.submit(task())
while queue.get(job.id).step < 3:
    time.sleep(0.01)
print(job.id, other.id, queue.get(job.id).worker[0], flush=True)
time.sleep(100)
"""


def test_a_killed_server_takes_its_worker_along(tmp_path: Path) -> None:
    server = Popen([sys.executable, "-c", SERVER, str(tmp_path)], stdout=PIPE, text=True)
    assert server.stdout is not None
    id, other, worker = server.stdout.readline().split()
    server.kill()
    server.wait()
    server.stdout.close()
    queue = open_queue(tmp_path)
    last, job = ended(queue, queue.get(other)), ended(queue, queue.get(id))
    assert job.state == last.state == "done"
    assert (job.finished_at or 0) < (last.finished_at or 0)
    assert text(queue, job).startswith("0 ")
    process = int(worker)
    assert not psutil.pid_exists(process) or psutil.Process(process).status() == "zombie"
    queue.stop()


def test_a_worker_that_outlives_its_server_is_ended() -> None:
    process = Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    started = psutil.Process(process.pid).create_time()
    end_process((process.pid, started - 100), grace=0.1)  # another process has the number
    assert process.poll() is None
    end_process((process.pid, started), grace=0.1)
    assert process.wait(5) == -signal.SIGKILL


def test_the_server_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tests.helpers.queue import ended, open_queue, task
queue = open_queue(Path({str(tmp_path)!r}))
queue.content(ended(queue, queue.submit(task())).id, "thumbnail")
queue.stop()
print([name for name in ("mlx", "numpy", "av", "PIL", "fastapi") if name in sys.modules])
"""
    process = Popen([sys.executable, "-c", code], stdout=PIPE, text=True)
    assert process.communicate()[0] == "[]\n"


def test_programs_that_cannot_be_started_are_tried_again(tmp_path: Path) -> None:
    queue = open_queue(tmp_path, programs=Programs(["/nonexistent"], FAKES.helper))
    job = queue.submit(task())
    assert queue.get(job.id).state == "queued"
    queue.stop()
