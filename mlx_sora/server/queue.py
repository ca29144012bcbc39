"""Jobs as clients see them. The methods of JobQueue block, and any thread may call them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_sora.errors import MemoryBudgetError, UsageError
from mlx_sora.server.checks import Sources, checked_task
from mlx_sora.server.store import (
    CANCELLED,
    DATABASE,
    DONE,
    FAILED,
    QUEUED,
    RUNNING,
    Job,
    Store,
    Upload,
)
from mlx_sora.server.task import (
    ConflictError,
    NotFoundError,
    PlanSummary,
    QueueFullError,
    Task,
    new_id,
)


@dataclass(frozen=True)
class Limits:
    """Bounds of what clients may send.

    queued: jobs that wait. upload: bytes of one upload; uploads: of all. events: recorded at most.
    """

    queued: int = 100
    upload: int = 1 << 30
    uploads: int = 20 << 30
    events: int = 50_000


class JobQueue:
    """Jobs of a folder: a database, videos, and the worker that makes one at a time.

    notices: lines for the user about what was found when it opened.
    """

    def __init__(self, folder: Path, limits: Limits = Limits()) -> None:
        """Open the folder, which is made if it is missing. Raises UsageError, MlxSoraError."""
        self.folder, self.limits = folder, limits
        self.notices: list[str] = []
        for name in ("videos", "uploads"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._store = Store(folder / DATABASE)
        self._sources = Sources(self._source_path)
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.RLock()

    def start(self) -> None:
        """Begin to work on the queue."""

    def stop(self) -> None:
        """Interrupt the running job, which goes on at the next start, and close the folder."""
        self._store.close()

    def plan(self, task: Task) -> PlanSummary:
        """Return what a task would need. Raises UsageError, WeightsError, NotFoundError."""
        checked = checked_task(task)
        self._sources.check(checked)
        return PlanSummary(model=checked.options.get("model", "shapes"))

    def submit(self, task: Task, parent: str | None = None, parent_kind: str | None = None) -> Job:
        """Put a task into the queue.

        parent: the job that it follows from; parent_kind: remix, edit, extend or repeat. Raises
        UsageError, MemoryBudgetError with what would fit, QueueFullError, NotFoundError.
        """
        checked = checked_task(task)
        plan = self.plan(checked)
        if not plan.fits:
            raise MemoryBudgetError(plan.error, plan.fix)
        job = Job(new_id("video_"), checked, model=plan.model, plan=plan, steps=plan.steps)
        added = self._store.add(job, self.limits.queued)
        if added is None:
            raise QueueFullError(
                f"{self.limits.queued} videos wait already.", "Try again when one is finished."
            )
        return self._tell(added)

    def get(self, id: str) -> Job:
        """Return a job. Raises NotFoundError."""
        return self._store.get(id)

    def list(
        self,
        limit: int = 20,
        after: str | None = None,
        order: str = "desc",
        states: Sequence[str] = (),
    ) -> Sequence[Job]:
        """Return jobs by the time of their submission, `desc` newest first.

        after: identifier of the job before the first. states: only jobs in these.
        """
        return self._store.list(limit, after, order, states)

    def delete(self, id: str) -> None:
        """End a job, and remove it with its files. Raises NotFoundError, ConflictError."""
        self._store.get(id)
        self._store.delete(id)

    def cancel(self, id: str) -> Job:
        """Interrupt a job that waits or runs; its checkpoint stays. Raises ConflictError."""
        return self._change(id, (QUEUED, RUNNING), state=CANCELLED)

    def resume(self, id: str) -> Job:
        """Put a cancelled or failed job into the queue again. Raises ConflictError."""
        return self._change(id, (CANCELLED, FAILED), state=QUEUED, error=None)

    def repeat(self, id: str, changes: Mapping[str, Any] | None = None) -> Job:
        """Submit the task of a job again, with some options changed; None takes one out."""
        task = self._store.get(id).task
        options = {**task.options, **(changes or {})}
        return self.submit(Task(task.kind, options), id, "repeat")

    def move(self, id: str, before: str | None = None) -> Job:
        """Put a job that waits before another; None: at the end. Raises ConflictError."""
        for each in filter(None, (id, before)):
            self._store.get(each)
        if not self._store.move(id, before):
            raise ConflictError("Only videos that wait can change places.", "Refresh the list.")
        return self._tell(self._store.get(id))

    def events(self, after: int = 0, id: str | None = None) -> Sequence[dict[str, Any]]:
        """Return the recorded events behind number `after`, oldest first, 500 at most.

        Each has its number, the id of its job, and the keys of --json-events; "job" stands for a
        change of the job, with its state.
        """
        return self._store.events(after, id)

    def last_event(self) -> int:
        """Return the number of the newest event; 0 without any."""
        return self._store.last_event()

    def subscribe(
        self, id: str | None = None, after: int | None = None, timeout: float = 15
    ) -> Iterator[dict[str, Any] | None]:
        """Yield events of one job or of all as they come; None after `timeout` quiet seconds.

        after: number of an event to go on behind; None: only new ones.
        """
        number = self._store.last_event() if after is None else after
        while True:
            found = self._store.events(number, id)
            if not found:
                found = self._store.wait_for_events(number, id, timeout)
            if not found:
                yield None
            for event in found:
                number = event["number"]
                yield event

    def has_checkpoint(self, job: Job) -> bool:
        """Return True if a run of the job would go on from a checkpoint."""
        return False

    def content(self, id: str, variant: str = "video") -> Path:
        """Return the file of a job: video, thumbnail, spritesheet, preview or record.

        Raises NotFoundError, and ConflictError as long as there is none.
        """
        raise NotFoundError(f"There is no {variant} of {id} yet.")

    def add_upload(self, stream: IO[bytes], name: str = "") -> Upload:
        """Read a picture or video. Raises UsageError for anything else, or if it is too large."""
        raise UsageError("Not yet.")

    def get_upload(self, id: str) -> Upload:
        """Return an upload. Raises NotFoundError."""
        return self._store.get_upload(id)

    def upload_content(self, id: str, variant: str = "file") -> Path:
        """Return the file of an upload: file or thumbnail. Raises NotFoundError."""
        return self.folder / "uploads" / self._store.get_upload(id).id

    def models(self) -> Sequence[dict[str, Any]]:
        """Return the models on this machine: id, name, defaults, path-free facts for clients."""
        return []

    def _source_path(self, id: str) -> Path:
        """Return the file of an upload, or of the video of a job."""
        if id.startswith("file-"):
            return self.folder / "uploads" / self._store.get_upload(id).id
        job = self._store.get(id)
        if job.state != DONE:
            raise ConflictError(f"{id} is not finished.", "Wait for it.")
        return self.folder / "videos" / job.output

    def _change(self, id: str, states: Sequence[str], **changes: Any) -> Job:
        job = self._store.update(id, when=states, **changes)
        if job is None:
            state = self._store.get(id).state
            raise ConflictError(f"This video is {state}.", f"It has to be {' or '.join(states)}.")
        return self._tell(job)

    def _tell(self, job: Job) -> Job:
        self._store.add_event(job.id, {"event": "job", "state": job.state})
        return job
