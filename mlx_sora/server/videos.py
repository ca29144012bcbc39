"""Routes of /v1/videos, as the video clients speak them, and what this server adds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.responses import FileResponse, StreamingResponse

from mlx_sora.server.bodies import read_fields
from mlx_sora.server.http_errors import HttpError
from mlx_sora.server.objects import DeletedObject, VideoList, VideoObject, video_object
from mlx_sora.server.queue import JobQueue
from mlx_sora.server.schema import body_docs, body_schema
from mlx_sora.server.store import QUEUED, RUNNING, STATES, Job
from mlx_sora.server.submission import check_id, read_changes, read_edit, read_extension, read_task
from mlx_sora.server.task import EDIT, GENERATE

#: Milliseconds after which clients ask again, by a header that they know.
POLL = {"openai-poll-after-ms": "500"}

#: Content types by suffix; a system may have others of its own.
_MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".png": "image/png",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

#: A file that is opened by itself runs no script and loads nothing.
_SEALED = {"content-security-policy": "default-src 'none'; media-src 'self'; sandbox"}

_ID = {"type": "object", "properties": {"id": {"type": "string"}}, "description": "{id}, or a file"}
_CREATE = body_docs(
    body_schema(GENERATE, kind={"enum": ["generate", "edit"], "default": "generate"})
)
_EDIT = body_docs(body_schema(EDIT, ("prompt", "video"), video=_ID))
_EXTEND = body_docs(body_schema(GENERATE, ("prompt", "video"), video=_ID))
_REMIX = body_docs(body_schema(EDIT))
_REPEAT = body_docs({"type": "object", "properties": {"changes": body_schema(GENERATE, ())}})
_MOVE = body_docs({"type": "object", "properties": {"before": {"type": ["string", "null"]}}})

Variant = Literal["video", "thumbnail", "spritesheet", "preview", "record"]

router = APIRouter(prefix="/v1/videos", tags=["videos"])


def get_queue(request: Request) -> JobQueue:
    """Return the queue of the application."""
    queue: JobQueue = request.app.state.queue
    return queue


Jobs = Annotated[JobQueue, Depends(get_queue)]
Fields = Annotated[dict[str, Any], Depends(read_fields)]


@router.post("", openapi_extra=_CREATE)
def create_video(queue: Jobs, fields: Fields) -> VideoObject:
    """Put a video into the queue. Every option goes along beside the fields of the video API."""
    return _shown(queue, queue.submit(read_task(queue, fields)))


@router.get("")
def list_videos(
    queue: Jobs,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=100)] = None,
    order: Literal["asc", "desc"] = "desc",
    state: Annotated[str | None, Query(max_length=100)] = None,
) -> VideoList:
    """List videos by the time of their submission. state: only those in these states."""
    states = [] if state is None else state.split(",")
    if wrong := [name for name in states if name not in STATES]:
        fix = f"Valid, joined by commas: {', '.join(STATES)}."
        raise HttpError(400, "invalid_value", f"Unknown state {wrong[0]!r}.", fix, param="state")
    jobs = queue.list(limit + 1, after, order, states)
    videos = [_shown(queue, job) for job in jobs[:limit]]
    first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
    return VideoList("list", videos, first, last, len(jobs) > limit)


@router.post("/edits", openapi_extra=_EDIT)
def edit_video(queue: Jobs, fields: Fields) -> VideoObject:
    """Change what a finished or an uploaded video shows."""
    task, parent = read_edit(queue, fields)
    return _shown(queue, queue.submit(task, parent, parent and "edit"))


@router.post("/extensions", openapi_extra=_EXTEND)
def extend_video(queue: Jobs, fields: Fields) -> VideoObject:
    """Go on from a finished or an uploaded video: the new one begins with its last 17 frames."""
    task, parent = read_extension(queue, fields)
    return _shown(queue, queue.submit(task, parent, parent and "extend"))


@router.get("/{id}")
def retrieve_video(queue: Jobs, id: str, response: Response) -> VideoObject:
    """Return a video."""
    response.headers.update(POLL)
    return _shown(queue, queue.get(id))


@router.delete("/{id}")
def delete_video(queue: Jobs, id: str) -> DeletedObject:
    """Cancel a video, and remove it with its files."""
    queue.delete(id)
    return DeletedObject(id, True, "video.deleted")


@router.post("/{id}/remix", openapi_extra=_REMIX)
def remix_video(queue: Jobs, id: str, fields: Fields) -> VideoObject:
    """Change what a finished video shows, as an edit does."""
    task, parent = read_edit(queue, fields, id)
    return _shown(queue, queue.submit(task, parent, "remix"))


@router.post("/{id}/cancel")
def cancel_video(queue: Jobs, id: str) -> VideoObject:
    """Interrupt a video; its checkpoint stays, so that it can be resumed."""
    return _shown(queue, queue.cancel(id))


@router.post("/{id}/resume")
def resume_video(queue: Jobs, id: str) -> VideoObject:
    """Go on with a cancelled or failed video."""
    return _shown(queue, queue.resume(id))


@router.post("/{id}/repeat", openapi_extra=_REPEAT)
def repeat_video(queue: Jobs, id: str, fields: Fields) -> VideoObject:
    """Make a video again, with some options changed; null takes one out."""
    _allow_only(fields, "changes")
    changes = read_changes(fields, queue.get(id).task.kind)
    return _shown(queue, queue.repeat(id, changes))


@router.post("/{id}/move", openapi_extra=_MOVE)
def move_video(queue: Jobs, id: str, fields: Fields) -> VideoObject:
    """Put a waiting video before another; without `before`, at the end."""
    _allow_only(fields, "before")
    before = fields.get("before")
    if before is not None:
        check_id("before", before)
    return _shown(queue, queue.move(id, before))


@router.get("/{id}/events")
def video_events(request: Request, queue: Jobs, id: str) -> StreamingResponse:
    """Stream the events of a video, all from the first one, or those after Last-Event-ID."""
    queue.get(id)
    return events_response(request, id, 0)


@router.get("/{id}/content", response_class=FileResponse)
def download_content(
    queue: Jobs, request: Request, id: str, variant: Variant = "video"
) -> Response:
    """Return the video, a thumbnail, a spritesheet, the newest preview or the record."""
    return file_response(request, queue.content(id, variant))


def file_response(request: Request, path: Path, headers: Mapping[str, str] = _SEALED) -> Response:
    """Return a file, a range of it, or that the client has it already."""
    try:
        status = path.stat()
    except OSError:
        raise HttpError(404, "not_found", "The file is gone.") from None
    kind = _MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")
    response = FileResponse(path, headers=headers, media_type=kind, stat_result=status)
    response.headers["cache-control"] = "private, no-cache"
    tag = response.headers["etag"]
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={"etag": tag})
    return response


def events_response(request: Request, id: str | None, default: int | None) -> StreamingResponse:
    """Return a stream of events; `default`: number to begin behind without Last-Event-ID."""
    last = request.headers.get("last-event-id", "")
    after = int(last) if last.isdecimal() and len(last) < 16 else default
    response: StreamingResponse = request.app.state.streams.response(id, after)
    return response


def _shown(queue: JobQueue, job: Job) -> VideoObject:
    return video_object(job, job.state not in (RUNNING, QUEUED) and queue.has_checkpoint(job))


def _allow_only(fields: Mapping[str, Any], *names: str) -> None:
    unknown = [name for name in fields if name not in names]
    if unknown:
        fix = f"Valid: {', '.join(names)}."
        raise HttpError(
            400,
            "invalid_value",
            f"There is no field {unknown[0][:80]!r} here.",
            fix,
            param=unknown[0],
        )
