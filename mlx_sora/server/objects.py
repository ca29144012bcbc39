"""Objects of the HTTP API: videos, plans, files and lists, made from jobs, plans and uploads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_sora.errors import INTERRUPTED
from mlx_sora.server.store import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job
from mlx_sora.server.task import PlanSummary, Upload

#: Status in the video API of each state of a job. It knows no cancelled ones.
STATUS = {
    QUEUED: "queued",
    RUNNING: "in_progress",
    DONE: "completed",
    FAILED: "failed",
    CANCELLED: "failed",
}

#: Codes of the errors of jobs, by the exit code of their worker.
_CODES = {2: "invalid_value", 3: "does_not_fit", 4: "model_unavailable", INTERRUPTED: "cancelled"}


@dataclass(frozen=True)
class ErrorObject:
    """The error of a video: a code, and one line with what to do."""

    code: str
    message: str


@dataclass(frozen=True)
class VideoObject:
    """A video, in the form of the video API. `mlx_sora` holds what that has no field for.

    Times are seconds since 1970; progress is 0 to 100; seconds is the length of the video.
    """

    id: str
    object: str
    model: str
    status: str
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str
    size: str
    error: ErrorObject | None
    remixed_from_video_id: str | None
    mlx_sora: dict[str, Any]


@dataclass(frozen=True)
class VideoList:
    """A page of videos. `last_id` is the `after` of the next one."""

    object: str
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


@dataclass(frozen=True)
class DeletedObject:
    """A video or a file that was deleted."""

    id: str
    deleted: bool
    object: str


@dataclass(frozen=True)
class FileObject:
    """An uploaded picture or video.

    request: the options recorded in it, if mlx_sora made it. frames: 1 for a picture.
    """

    id: str
    object: str
    kind: str
    filename: str
    created_at: int
    width: int
    height: int
    frames: int
    fps: float | None
    request: dict[str, Any] | None


def video_object(job: Job, checkpoint: bool = False) -> VideoObject:
    """Return the object of a job. checkpoint: it can be resumed."""
    plan = job.plan or PlanSummary()
    finished = job.state == DONE and job.finished_at is not None
    return VideoObject(
        id=job.id,
        object="video",
        model=job.model,
        status=STATUS[job.state],
        progress=100 if job.state == DONE else min(99, int(job.progress * 100)),
        created_at=int(job.created_at),
        completed_at=int(job.finished_at) if finished and job.finished_at else None,
        expires_at=None,
        prompt=job.task.prompt,
        seconds=seconds_text(plan.video_seconds),
        size=f"{plan.width}x{plan.height}",
        error=_error_object(job),
        remixed_from_video_id=job.parent if job.parent_kind == "remix" else None,
        mlx_sora=_details(job) | {"checkpoint": checkpoint},
    )


def file_object(upload: Upload) -> FileObject:
    """Return the object of an upload."""
    return FileObject(
        id=upload.id,
        object="file",
        kind=upload.kind,
        filename=upload.name,
        created_at=int(upload.created_at),
        width=upload.width,
        height=upload.height,
        frames=upload.frames,
        fps=upload.fps,
        request=None if upload.request is None else dict(upload.request),
    )


def seconds_text(seconds: float) -> str:
    """Return seconds as the API writes them: text, without needless digits."""
    return f"{seconds:.2f}".rstrip("0").rstrip(".")


def _details(job: Job) -> dict[str, Any]:
    plan = job.plan or PlanSummary()
    options = dict(job.task.options)
    return {
        "state": job.state,
        "kind": job.task.kind,
        "position": job.position,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "stage": job.stage,
        "step": job.step,
        "steps": job.steps,
        "seconds_left": job.seconds_left,
        "peak_memory": job.peak_memory,
        "warnings": list(job.warnings),
        "options": options,
        "seed": options.get("seed"),
        "frames": plan.frames,
        "fps": plan.fps,
        "parent": job.parent,
        "parent_kind": job.parent_kind,
        "attempts": job.attempts,
        "plan": None if job.plan is None else job.plan.to_dict(),
    }


def _error_object(job: Job) -> ErrorObject | None:
    if job.error is None:
        cancelled = ErrorObject("cancelled", "The video was cancelled. Resume it to go on.")
        return cancelled if job.state == CANCELLED else None
    code = _CODES.get(job.error.exit_code, "run_failed")
    return ErrorObject(code, f"{job.error.message} {job.error.fix}".strip())


def plan_object(plan: PlanSummary) -> dict[str, Any]:
    """Return a plan as JSON values, with size and seconds in the form of the video API."""
    return {
        "object": "plan",
        **plan.to_dict(),
        "size": f"{plan.width}x{plan.height}",
    }
