"""A queue of the server without processes: jobs stay as they are until a test finishes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from mlx_sora.errors import MemoryBudgetError, UsageError
from mlx_sora.geometry import parse_frames
from mlx_sora.server.checks import checked_task
from mlx_sora.server.queue import JobQueue
from mlx_sora.server.store import CANCELLED, DONE, QUEUED, RUNNING, Job, JobError
from mlx_sora.server.task import (
    ConflictError,
    NotFoundError,
    PlanSummary,
    QueueFullError,
    Task,
    Upload,
    new_id,
)

#: A task with more frames than this does not fit.
MOST_FRAMES = 1000

SUFFIXES = {"video": "mp4", "thumbnail": "png", "spritesheet": "png", "record": "json"}


class FakeQueue(JobQueue):
    """Jobs in memory. Files hold the name of their variant."""

    def __init__(self, folder: Path, length: int = 100) -> None:
        self._folder, self.length, self.notices = folder, length, []
        self._jobs: dict[str, Job] = {}
        self._uploads: dict[str, Upload] = {}
        self._events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        #: What plans wait for.
        self.pause = threading.Event()
        self.pause.set()
        #: Bytes of each upload, in order.
        self.received: list[bytes] = []

    @property
    def folder(self) -> Path:
        return self._folder

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def plan(self, task: Task) -> PlanSummary:
        self.pause.wait(20)
        options = checked_task(task).options
        frames = parse_frames(options.get("num_frames", 17))
        width, height = options.get("width", 64), options.get("height", 64)
        size = {"width": width, "height": height, "frames": frames, "fps": 24.0, "steps": 30}
        if frames > MOST_FRAMES:
            return PlanSummary("shapes", **size, fits=False, error="Too long.", fix="Try 17.")
        return PlanSummary("shapes", **size, peak=100, smallest=50, capacity=1000)

    def submit(self, task: Task, parent: str | None = None, parent_kind: str | None = None) -> Job:
        task, plan = checked_task(task), self.plan(task)
        if not plan.fits:
            raise MemoryBudgetError(plan.error, plan.fix)
        if sum(job.state == QUEUED for job in self._jobs.values()) >= self.length:
            raise QueueFullError("The queue is full.", "Wait.")
        number = len(self._jobs)
        job = Job(
            *(new_id("video_"), task),
            position=number,
            created_at=1000.0 + number,
            model="shapes",
            parent=parent,
            parent_kind=parent_kind,
            plan=plan,
            steps=plan.steps,
        )
        return self.put(job)

    def put(self, job: Job) -> Job:
        """Set a job, and tell that it has changed."""
        self._jobs[job.id] = job
        self.tell(job.id, {"event": "job", "state": job.state})
        return job

    def tell(self, id: str, event: Mapping[str, Any]) -> None:
        """Add an event."""
        with self._news:
            self._events.append({"number": len(self._events) + 1, "id": id, "at": 0.0, **event})
            self._news.notify_all()

    def change(self, id: str, **changes: Any) -> Job:
        """Change fields of a job."""
        return self.put(replace(self.get(id), **changes))

    def finish(self, id: str) -> Job:
        """Let a job be done, with files."""
        for variant, suffix in SUFFIXES.items():
            (self.folder / f"{id}-{variant}.{suffix}").write_text(variant * 100)
        return self.change(id, state=DONE, progress=1.0, finished_at=2000.5, position=None)

    def fail(self, id: str, error: JobError) -> Job:
        """Let a job fail."""
        return self.change(id, state="failed", error=error, finished_at=2000.0)

    def get(self, id: str) -> Job:
        if id not in self._jobs:
            raise NotFoundError(f"There is no video {id[:60]!r}.", "GET /v1/videos lists all.")
        return self._jobs[id]

    def list(
        self,
        limit: int = 20,
        after: str | None = None,
        order: str = "desc",
        states: Sequence[str] = (),
    ) -> Sequence[Job]:
        jobs = sorted(self._jobs.values(), key=lambda job: job.id, reverse=order == "desc")
        jobs = [j for j in jobs if not after or (j.id > after if order == "asc" else j.id < after)]
        return [job for job in jobs if not states or job.state in states][:limit]

    def delete(self, id: str) -> None:
        self.get(id)
        del self._jobs[id]

    def cancel(self, id: str) -> Job:
        if self.get(id).state not in (QUEUED, RUNNING):
            raise ConflictError("This video is done.", "Delete it.")
        return self.change(id, state=CANCELLED)

    def resume(self, id: str) -> Job:
        return self.change(id, state=QUEUED)

    def repeat(self, id: str, changes: Mapping[str, Any] | None = None) -> Job:
        task = self.get(id).task
        return self.submit(Task(task.kind, {**task.options, **(changes or {})}), id, "repeat")

    def move(self, id: str, before: str | None = None) -> Job:
        return self.change(id, position=0 if before else 99)

    def events(self, after: int = 0, id: str | None = None) -> Sequence[dict[str, Any]]:
        return [e for e in self._events[after:] if id is None or e["id"] == id]

    def last_event(self) -> int:
        return len(self._events)

    def subscribe(
        self, id: str | None = None, after: int | None = None, timeout: float = 15
    ) -> Iterator[dict[str, Any] | None]:
        number = self.last_event() if after is None else after
        while True:
            with self._news:
                if not self.events(number, id):
                    self._news.wait(timeout)
            found = self.events(number, id)
            yield from found or [None]
            number = found[-1]["number"] if found else number

    def has_checkpoint(self, job: Job) -> bool:
        return job.state == CANCELLED

    def content(self, id: str, variant: str = "video") -> Path:
        if self.get(id).state != DONE:
            raise ConflictError(f"There is no {variant} of {id} yet.", "Wait.")
        return self.folder / f"{id}-{variant}.{SUFFIXES[variant]}"

    def add_upload(self, stream: IO[bytes], name: str = "") -> Upload:
        data = stream.read()
        if not data.startswith((b"picture", b"video")):
            raise UsageError(f"{name} is no picture or video.", "Send another file.")
        self.received.append(data)
        frames = 1 if data.startswith(b"picture") else 51
        request = {"prompt": "a red circle"} if b"record" in data else None
        kind, fps = ("image", None) if frames == 1 else ("video", 24.0)
        upload = Upload(new_id("file-"), kind, 64, 64, frames, fps, name, 1.0, request)
        (self.folder / upload.id).write_bytes(data)
        self._uploads[upload.id] = upload
        return upload

    def get_upload(self, id: str) -> Upload:
        if id not in self._uploads:
            raise NotFoundError(f"There is no file {id[:60]!r}.", "POST /v1/files adds one.")
        return self._uploads[id]

    def delete_upload(self, id: str) -> None:
        self.get_upload(id)
        del self._uploads[id]

    def upload_content(self, id: str, variant: str = "file") -> Path:
        return self.folder / self.get_upload(id).id

    def models(self) -> Sequence[dict[str, Any]]:
        return [{"id": "shapes", "name": "shapes", "defaults": {"width": 64}}]
