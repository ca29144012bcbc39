"""The thread that makes the videos of a queue, one after the other."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from mlx_sora.errors import INTERRUPTED, MemoryBudgetError, MlxSoraError
from mlx_sora.runtime.footprint import available_ram
from mlx_sora.server.checks import Sources, command
from mlx_sora.server.folder import Folder
from mlx_sora.server.processes import WORKER, Progress, WorkerProcess
from mlx_sora.server.store import (
    DONE,
    FAILED,
    QUEUED,
    RUNNING,
    Job,
    JobError,
    Store,
)
from mlx_sora.server.task import NotFoundError
from mlx_sora.utils.files import fsync

logger = logging.getLogger(__name__)

#: Seconds: between looks at the queue; that a job waits for the memory of its plan before it takes
#: less; that an interrupted worker has to end.
_LOOK, _PATIENCE, _GRACE = 1.0, 20.0, 30.0

#: Workers that the system may end, one after the other without a step, before a job has failed.
_MAX_KILLS = 5

#: Events that clients see. Others of a later version are left out.
_EVENTS = (
    *("note", "noted", "warned", "stage_started", "stage_progress", "step_finished"),
    *("preview_ready", "stage_finished", "finished"),
)


class Scheduler:
    """Thread with at most one worker. Other threads tell it what has changed."""

    def __init__(
        self,
        folder: Folder,
        store: Store,
        sources: Sources,
        program: Sequence[str] = WORKER,
        available: Callable[[], int | None] = available_ram,
    ) -> None:
        """Set up; program: of a worker. available: memory that a new one could take, in bytes."""
        self._folder, self._store, self._sources = folder, store, sources
        self._program, self._available = program, available
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._lock = threading.Lock()
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._worker: WorkerProcess | None = None
        self._job: Job | None = None
        self._kills: dict[str, int] = {}
        self._waiting: tuple[str, float] | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Interrupt the worker; its job waits again. Returns when it has ended."""
        self._stopping.set()
        self._wake.set()
        if not self._thread.is_alive():
            return
        self._interrupt()
        self._thread.join(_GRACE)
        if self._thread.is_alive():
            self._end()
            self._thread.join(_GRACE)

    def wake(self) -> None:
        """Look at the queue again."""
        self._wake.set()

    def interrupt(self, id: str) -> None:
        """Interrupt the worker of a job, if it has one; kill it if it does not end."""
        if self._interrupt(id):
            timer = threading.Timer(_GRACE, self._end, (id,))
            timer.daemon = True
            timer.start()

    def kill(self, id: str, timeout: float = 10) -> None:
        """End the worker of a job, if it has one, and wait until it is gone."""
        self._end(id)
        end = time.monotonic() + timeout
        while self._is_working_on(id) and time.monotonic() < end:
            time.sleep(0.01)

    def _is_working_on(self, id: str) -> bool:
        with self._lock:
            return self._job is not None and self._job.id == id

    def _interrupt(self, id: str | None = None) -> bool:
        with self._lock:
            if self._worker is None or (id is not None and self._job and self._job.id != id):
                return False
            self._worker.interrupt()
            return True

    def _end(self, id: str | None = None) -> None:
        with self._lock:
            if self._worker is not None and (id is None or (self._job and self._job.id == id)):
                self._worker.kill()

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                job = self._store.next()
                if job is not None and self._has_memory(job):
                    self._run(job)
                    continue
            except MlxSoraError as error:  # a full disk: try again
                logger.warning("%s", error)
            except Exception:
                logger.exception("the scheduler goes on")
            self._wake.wait(_LOOK)
            self._wake.clear()

    def _has_memory(self, job: Job) -> bool:
        """Return True if the memory for a job is there now, or enough of it after a while."""
        plan, free = job.plan, self._available()
        if plan is None or free is None or not plan.in_ram or plan.needed <= free:
            self._waiting = None
            return True
        if self._waiting is None or self._waiting[0] != job.id:
            self._waiting = job.id, time.monotonic()
            self._tell(self._store.update(job.id, when=(QUEUED,), stage="memory"))
        patient = time.monotonic() - self._waiting[1] < _PATIENCE
        return not patient and plan.smallest <= free

    def _run(self, job: Job) -> None:
        """Make the video of a job, and record how that ended."""
        if self._folder.video(job).exists():  # the last thing that a killed worker did
            self._finish(job, 0, "", None)
            return
        worker = WorkerProcess(self._program)
        with self._lock:
            self._worker, self._job = worker, job
        failure: Mapping[str, Any] | None = None
        try:
            started = None if self._stopping.is_set() else self._mark_running(job, worker)
            if started is None:
                worker.kill()
            else:
                worker.send(self._words(started))
                failure = self._follow(started, worker)
        except MlxSoraError as error:
            failure = {"message": str(error), "exit_code": error.exit_code}
            worker.kill()
        except BaseException:
            worker.kill()
            raise
        finally:
            code, last = worker.wait()
            with self._lock:
                self._worker = None
            self._until_written(lambda: self._finish(job, code, last, failure))
            with self._lock:
                self._job = None

    def _mark_running(self, job: Job, worker: WorkerProcess) -> Job | None:
        """Record that a job has a worker; None if it waits no longer."""
        changes: dict[str, Any] = {"stage": "", "error": None, "worker": worker.identity}
        changes |= {"started_at": job.started_at or time.time(), "attempts": job.attempts + 1}
        started = self._store.update(job.id, when=(QUEUED,), state=RUNNING, **changes)
        self._tell(started)
        return started

    def _words(self, job: Job) -> list[str]:
        plan, output = job.plan, self._folder.video(job)
        steps, previews = (plan.steps, plan.previews) if plan else (0, False)
        words = command(job.task, self._sources, output, steps=steps, previews=previews)
        if plan is None or {"memory_budget", "device_profile"} & job.task.options.keys():
            return words
        budget, free = plan.budget, self._available()
        if free is not None and plan.in_ram and free < plan.needed:
            budget = max(free, plan.smallest)
        return words if budget is None else [*words, f"--memory-budget={budget}"]

    def _follow(self, job: Job, worker: WorkerProcess) -> dict[str, Any] | None:
        """Record the events of a worker until it ends; return the one that says why it failed."""
        progress, failure, warnings = Progress(job), None, list(job.warnings)
        for event in worker.events():
            if event["event"] == "error":
                failure = event
            if event["event"] not in _EVENTS:
                continue
            shown = self._folder.hide_paths(event)
            shown.pop("path", None)
            changes = progress.handle(event)
            if event["event"] == "step_finished":
                self._kills.pop(job.id, None)
            if event["event"] in ("warned", "finished"):
                warnings += shown.get("warnings") or [shown.get("message")]
                changes = {"warnings": tuple(dict.fromkeys(filter(None, warnings)))}
            with suppress(MlxSoraError):  # a full disk, or the job is deleted
                if changes:
                    self._store.update(job.id, durable=False, **changes)
                shown |= {n: changes[n] for n in ("progress", "seconds_left") if n in changes}
                self._store.add_event(job.id, shown)
        return failure

    def _finish(self, job: Job, code: int, last: str, failure: Mapping[str, Any] | None) -> None:
        """Record the end of a run, whatever became of the job meanwhile."""
        try:
            now = self._store.get(job.id)
        except NotFoundError:  # whoever has deleted it removes the files
            return
        video = self._folder.video(job)
        common: dict[str, Any] = {"worker": None, "seconds_left": None}
        if video.is_file():
            fsync(self._folder.videos)
            self._folder.remove_run(job)
            common |= {"progress": 1.0, "stage": "", "error": None, "finished_at": time.time()}
            self._tell(self._store.update(job.id, state=DONE, **common))
        elif self._stopping.is_set():  # it waits for the next start
            self._end_running(job, QUEUED, common)
        elif now.state != RUNNING:
            self._end_running(job, now.state, common)
        elif (
            failure is not None
            and code != INTERRUPTED
            and self._set_checkpoint_aside(job, str(failure["message"]))
        ):
            warning = f"It began again: {failure['message']}"
            self._end_running(job, QUEUED, common | {"warnings": (*now.warnings, warning)})
        elif (code < 0 or code == INTERRUPTED) and self._kills.get(job.id, 0) + 1 < _MAX_KILLS:
            self._kills[job.id] = self._kills.get(job.id, 0) + 1
            self._end_running(job, QUEUED, common)
        else:
            self._kills.pop(job.id, None)
            error = self._error(code, last, failure)
            self._end_running(job, FAILED, common | {"finished_at": time.time(), "error": error})

    def _end_running(self, job: Job, state: str, changes: Mapping[str, Any]) -> None:
        """Let a job that runs have failed, or wait before all others.

        What a client makes of it meanwhile, cancelled or waiting again, stays.
        """
        ended = self._store.update(job.id, when=(RUNNING,), state=state, **changes)
        if ended is None:
            ended = self._store.update(job.id, worker=None, seconds_left=None)
        elif state == QUEUED:
            self._store.put_first(job.id)
        self._tell(ended)

    def _error(self, code: int, last: str, failure: Mapping[str, Any] | None) -> JobError:
        if failure is not None and code != INTERRUPTED:
            message = self._folder.hide_paths(str(failure["message"]))
            return JobError(message, "", int(failure.get("exit_code", 1)))
        if code < 0 or code == INTERRUPTED:
            with suppress(ValueError):
                last = signal.Signals(-code).name
            fix = "Was the memory full? Make a smaller video, or close other programs and resume."
            return JobError(
                f"The system ended the worker: {last}.", fix, MemoryBudgetError.exit_code
            )
        reason = last or f"exit code {code}"
        return JobError(f"The worker failed: {self._folder.hide_paths(reason)}", "Resume it.", code)

    def _set_checkpoint_aside(self, job: Job, message: str) -> bool:
        """Rename the checkpoint of a job if an error is about it: damaged, or of another run."""
        path = self._folder.checkpoint(job)
        if path.name not in message or not path.exists() or "Cannot write" in message:
            return False
        os.replace(path, path.with_name(path.name + ".unusable"))
        return True

    def _until_written(self, write: Callable[[], None]) -> None:
        """Try to record a change until that succeeds, or the server stops."""
        while True:
            try:
                write()
                return
            except (MlxSoraError, OSError) as error:
                logger.warning("%s", error)
            if self._stopping.is_set():
                return
            time.sleep(_LOOK)

    def _tell(self, job: Job | None) -> None:
        if job is not None:
            with suppress(MlxSoraError):
                self._store.add_event(job.id, {"event": "job", "state": job.state})
