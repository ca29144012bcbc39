"""Jobs as clients see them. The methods of JobQueue block, and any thread may call them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_sora.errors import MemoryBudgetError
from mlx_sora.runtime.footprint import available_ram
from mlx_sora.server.checks import Sources, checked_task, source_ids
from mlx_sora.server.folder import RECORD, SPRITESHEET, THUMBNAIL, Folder
from mlx_sora.server.helper import HELPER, Helper
from mlx_sora.server.processes import WORKER
from mlx_sora.server.recovery import open_store, recover
from mlx_sora.server.scheduler import Scheduler
from mlx_sora.server.store import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job
from mlx_sora.server.task import (
    ConflictError,
    NotFoundError,
    PlanSummary,
    QueueFullError,
    Task,
    Upload,
    new_id,
    with_changes,
)
from mlx_sora.server.uploads import add_upload, check_unused, delete_upload, make_room
from mlx_sora.utils.files import atomic_write

VARIANTS = ("video", "thumbnail", "spritesheet", "preview", "record")

#: Seconds for which the list of models is remembered, and events between two clearings.
_MODELS_AGE = 5.0


@dataclass(frozen=True)
class Limits:
    """Bounds of what clients may send.

    queued: jobs that wait. upload: bytes of one upload; uploads: of all. events: recorded at most.
    """

    queued: int = 100
    upload: int = 1 << 30
    uploads: int = 20 << 30
    events: int = 50_000


@dataclass(frozen=True)
class Programs:
    """Child processes of the server. available: memory that a new one could take, in bytes."""

    worker: Sequence[str] = WORKER
    helper: Sequence[str] = HELPER
    available: Callable[[], int | None] = available_ram


class JobQueue:
    """Jobs of a folder: a database, videos, and the worker that makes one at a time.

    notices: lines for the user about what was found when it opened.
    """

    def __init__(
        self, folder: Path, limits: Limits = Limits(), programs: Programs = Programs()
    ) -> None:
        """Open the folder, which is made if it is missing.

        Raises UsageError for a folder that another server uses and for a database of another
        version, MlxSoraError if it cannot be written.
        """
        self.limits, self.notices = limits, list[str]()
        self.files = Folder(folder)
        self.files.lock()
        try:
            self._store = open_store(self.files, self.notices)
            self._helper = Helper(programs.helper)
            recover(self.files, self._store, self._helper, self.notices)
        except BaseException:
            self.files.unlock()
            raise
        self._sources = Sources(self._source_path)
        self._scheduler = Scheduler(
            self.files, self._store, self._sources, programs.worker, programs.available
        )
        self._picture_lock = threading.Lock()
        self._models: tuple[float, list[dict[str, Any]]] = (0.0, [])

    @property
    def folder(self) -> Path:
        """Folder of the server."""
        return self.files.path

    def start(self) -> None:
        """Begin to work on the queue."""
        self._scheduler.start()

    def stop(self) -> None:
        """Interrupt the running job, which goes on at the next start, and close the folder."""
        self._scheduler.stop()
        self._helper.close()
        self._store.close()
        self.files.unlock()

    def plan(self, task: Task) -> PlanSummary:
        """Return what a task would need; `fits` is False if it never fits this machine.

        Raises UsageError, WeightsError, NotFoundError, ConflictError.
        """
        return self._plan(checked_task(task))

    def submit(self, task: Task, parent: str | None = None, parent_kind: str | None = None) -> Job:
        """Put a task into the queue.

        parent: the job that it follows from; parent_kind: remix, edit, extend or repeat. Raises
        UsageError, MemoryBudgetError with what would fit, QueueFullError, NotFoundError.
        """
        checked = checked_task(task)
        plan = self._plan(checked)
        if not plan.fits:
            raise MemoryBudgetError(plan.error, plan.fix)
        # Named, so that a model that is downloaded meanwhile changes nothing.
        checked = Task(checked.kind, {**checked.options, "model": plan.model})
        id = new_id("video_")
        job = Job(
            id,
            checked,
            created_at=time.time(),
            model=plan.model,
            steps=plan.steps,
            warnings=plan.warnings,
            parent=parent,
            parent_kind=parent_kind,
            output=id + plan.suffix,
            plan=plan,
        )
        if not self._store.add(job, self.limits.queued):
            raise QueueFullError(
                f"{self.limits.queued} videos wait already.", "Try again when one is finished."
            )
        self._store.drop_events(self.limits.events)
        return self._tell(id)

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
        """End a job, and remove it with its files.

        Raises NotFoundError, and ConflictError if a job that waits or runs needs its video.
        """
        job = self._store.get(id)
        check_unused(self._store, id)
        self._store.hide(id)
        self._scheduler.kill(id)
        self.files.remove_job(job)
        self._store.delete(id)
        self._store.add_event(id, {"event": "deleted"})
        self._scheduler.wake()

    def cancel(self, id: str) -> Job:
        """Interrupt a job that waits or runs; its checkpoint stays. Raises ConflictError.

        A run that can no longer be interrupted becomes done all the same.
        """
        self._change(id, (QUEUED, RUNNING), state=CANCELLED, finished_at=time.time())
        self._scheduler.interrupt(id)
        return self._tell(id)

    def resume(self, id: str) -> Job:
        """Put a cancelled or failed job into the queue again. Raises ConflictError.

        It goes on from its checkpoint; an edit, which has none, begins again.
        """
        job = self._store.get(id)
        self._sources.check(job.task)
        if job.plan is None or not job.plan.suffix:  # taken in from a checkpoint
            plan = self._plan(checked_task(job.task))
            self._store.update(id, plan=plan, model=plan.model)
        self._change(id, (CANCELLED, FAILED), state=QUEUED, error=None, finished_at=None)
        return self._tell(id)

    def repeat(self, id: str, changes: Mapping[str, Any] | None = None) -> Job:
        """Submit the task of a job again, with some options changed; None takes one out."""
        task = self._store.get(id).task
        return self.submit(Task(task.kind, with_changes(task.options, changes or {})), id, "repeat")

    def move(self, id: str, before: str | None = None) -> Job:
        """Put a job that waits before another; None: at the end. Raises ConflictError."""
        for each in filter(None, (id, before)):
            self._store.get(each)
        if not self._store.move(id, before):
            raise ConflictError("Only videos that wait can change places.", "Refresh the list.")
        return self._tell(id)

    def events(self, after: int = 0, id: str | None = None) -> Sequence[dict[str, Any]]:
        """Return the recorded events behind number `after`, oldest first, 500 at most.

        Each has its number, the id of its job, and the keys of --json-events. "job" stands for a
        change of the job, with its state; "deleted" for its end.
        """
        return self._store.events(after, id)

    def last_event(self) -> int:
        """Return the number of the newest event; 0 without any."""
        return self._store.last_event()

    def subscribe(
        self, id: str | None = None, after: int | None = None, timeout: float = 15
    ) -> Iterator[dict[str, Any] | None]:
        """Yield events of one job or of all as they come; None after `timeout` quiet seconds.

        after: number of an event to go on behind; None: only new ones. Ends when the queue stops.
        """
        number = self._store.last_event() if after is None else after
        while not self._store.closed:
            found = self._store.wait_for_events(number, id, timeout)
            if not found:
                yield None
            for event in found:
                number = event["number"]
                yield event

    def has_checkpoint(self, job: Job) -> bool:
        """Return True if a run of the job would go on from a checkpoint."""
        return job.state != DONE and self.files.checkpoint(job).is_file()

    def content(self, id: str, variant: str = "video") -> Path:
        """Return the file of a job: video, thumbnail, spritesheet, preview or record.

        Pictures and records are made when they are asked for first. Raises NotFoundError, and
        ConflictError as long as there is none.
        """
        job = self._store.get(id)
        if variant not in VARIANTS:
            raise NotFoundError(f"There is no {variant[:40]!r}.", f"Valid: {', '.join(VARIANTS)}.")
        if variant == "preview":
            if not (path := self.files.preview(job)).is_file():
                raise ConflictError("There is no preview now.", "Only a running video has one.")
            return path
        video = self.files.video(job)
        if job.state != DONE or not video.is_file():
            raise ConflictError(f"This video is {job.state}.", "Wait until it is finished.")
        return video if variant == "video" else self._derived(id, video, variant)

    def add_upload(self, stream: IO[bytes], name: str = "") -> Upload:
        """Read a picture or video. Raises UsageError for anything else, or if it is too large."""
        make_room(self.files, self._store, self.limits.uploads)
        return add_upload(self.files, self._store, self._helper, stream, self.limits.upload, name)

    def get_upload(self, id: str) -> Upload:
        """Return an upload. Raises NotFoundError."""
        return self._store.get_upload(id)

    def delete_upload(self, id: str) -> None:
        """Remove an upload. Raises NotFoundError, and ConflictError if a job waits for it."""
        delete_upload(self.files, self._store, id)

    def upload_content(self, id: str, variant: str = "file") -> Path:
        """Return the file of an upload, or its thumbnail. Raises NotFoundError."""
        path = self.files.uploads / self._store.get_upload(id).id
        return path if variant == "file" else self._derived(id, path, "thumbnail")

    def models(self) -> Sequence[dict[str, Any]]:
        """Return the models on this machine: id, name, created and defaults, the default first."""
        if time.monotonic() - self._models[0] > _MODELS_AGE or not self._models[1]:
            self._models = time.monotonic(), self._helper.call("models")["models"]
        return self._models[1]

    def _plan(self, checked: Task) -> PlanSummary:
        paths = {id: str(self._sources.path(id)) for id in source_ids(checked)}
        found = self._helper.call(
            "plan",
            kind=checked.kind,
            options=dict(checked.options),
            paths=paths,
            output=str(self.files.videos / "plan"),
        )
        return PlanSummary.from_dict(_with_names(found, paths))

    def _derived(self, id: str, source: Path, variant: str) -> Path:
        suffixes = {"thumbnail": THUMBNAIL, "spritesheet": SPRITESHEET, "record": RECORD}
        path = self.files.picture(id, suffixes[variant])
        with self._picture_lock:
            if path.is_file():
                return path
            if variant != "record":
                self._helper.call(variant, path=str(source), target=str(path))
                return path
            record = self._helper.call("record", path=str(source))["record"]
            with atomic_write(path, overwrite=True) as file:
                file.partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
        return path

    def _source_path(self, id: str) -> Path:
        """Return the file of an upload, or of the video of a job."""
        if id.startswith("file-"):
            return self.files.uploads / self._store.get_upload(id).id
        job = self._store.get(id)
        if job.state != DONE:
            raise ConflictError(f"{id} is {job.state}.", "Wait until it is finished.")
        return self.files.video(job)

    def _change(self, id: str, states: Sequence[str], **changes: Any) -> None:
        if self._store.update(id, when=states, **changes) is None:
            state = self._store.get(id).state
            raise ConflictError(f"This video is {state}.", f"It has to be {' or '.join(states)}.")

    def _tell(self, id: str) -> Job:
        job = self._store.get(id)
        self._store.add_event(id, {"event": "job", "state": job.state})
        self._scheduler.wake()
        return job


def _with_names(plan: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """Return a plan with the identifiers of files in place of their paths."""
    text = json.dumps(plan)
    for id, path in paths.items():
        text = text.replace(json.dumps(path)[1:-1], id)
    found: dict[str, Any] = json.loads(text)
    return found
