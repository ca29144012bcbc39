"""The HTTP application: routes, errors in one form, and the guard before all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from mlx_sora import __version__
from mlx_sora.errors import MlxSoraError
from mlx_sora.server import pages, videos
from mlx_sora.server.events import EventStreams
from mlx_sora.server.http_errors import HttpError, error_response
from mlx_sora.server.objects import DeletedObject, FileObject, file_object, plan_object
from mlx_sora.server.queue import JobQueue
from mlx_sora.server.schema import body_docs, body_schema, option_records, preset_records
from mlx_sora.server.security import Access, App, Guard
from mlx_sora.server.submission import read_task
from mlx_sora.server.task import GENERATE
from mlx_sora.server.videos import Fields, Jobs, events_response, file_response


def make_app(queue: JobQueue, access: Access, closing: Callable[[], bool] = lambda: False) -> App:
    """Return the ASGI application of a queue. closing: True when the server ends."""
    api = FastAPI(
        title="mlx_sora",
        version=__version__,
        description="Videos from text, through a queue, in the form of OpenAI's video API.",
        docs_url=None,
        redoc_url=None,
    )
    api.state.queue, api.state.access = queue, access
    api.state.streams = EventStreams(queue, closing)
    api.add_exception_handler(MlxSoraError, _answer_error)
    api.add_exception_handler(RequestValidationError, _answer_error)
    api.add_exception_handler(HTTPException, _answer_error)
    api.add_exception_handler(Exception, _answer_error)
    for router in (videos.router, pages.router):
        api.include_router(router)
    _add_routes(api)
    return Guard(api, access)


def _add_routes(api: FastAPI) -> None:
    api.get("/healthz")(health)
    api.get("/v1/models")(list_models)
    api.get("/v1/options")(list_options)
    api.post("/v1/plan", openapi_extra=body_docs(body_schema(GENERATE)))(plan)
    api.post("/v1/files", openapi_extra=_FILE)(add_file)
    api.get("/v1/files/{id}")(retrieve_file)
    api.delete("/v1/files/{id}")(delete_file)
    api.get("/v1/files/{id}/content")(download_file)
    api.get("/v1/events")(events)


_FILE = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                    "required": ["file"],
                }
            }
        },
    }
}


def health() -> dict[str, str]:
    """Return that the server is alive. This needs no token."""
    return {"status": "ok"}


def list_models(queue: Jobs) -> dict[str, Any]:
    """List the models on this machine: defaults, what they can draw, whether they fit."""
    return {"object": "list", "data": [_model_object(model) for model in queue.models()]}


def list_options(task: Literal["generate", "edit"] = "generate") -> dict[str, Any]:
    """List the options of a task with their types and help, and the presets."""
    return {"object": "list", "data": option_records(task), "presets": preset_records()}


def plan(queue: Jobs, fields: Fields) -> dict[str, Any]:
    """Return what a video would need, and whether that is there, without making it."""
    return plan_object(queue.plan(read_task(queue, fields)))


def add_file(queue: Jobs, fields: Fields) -> FileObject:
    """Upload a picture or a video, to name it by its id in a request."""
    file: Any = fields.get("file")
    if not hasattr(file, "filename"):
        fix = "Send it as the field `file` of a form: curl -F file=@picture.png."
        raise HttpError(400, "invalid_value", "There is no file.", fix, param="file")
    return file_object(queue.add_upload(file.file, file.filename or ""))


def retrieve_file(queue: Jobs, id: str) -> FileObject:
    """Return an upload."""
    return file_object(queue.get_upload(id))


def delete_file(queue: Jobs, id: str) -> DeletedObject:
    """Remove an upload that no video waits for."""
    queue.delete_upload(id)
    return DeletedObject(id, True, "file")


def download_file(
    queue: Jobs, request: Request, id: str, variant: Literal["file", "thumbnail"] = "file"
) -> Response:
    """Return an upload, or a small picture of it."""
    return file_response(request, queue.upload_content(id, variant))


def events(
    request: Request, after: Annotated[int | None, Query(ge=0, le=2**53)] = None
) -> StreamingResponse:
    """Stream the events of all videos, from now on, or those after a number or Last-Event-ID."""
    return events_response(request, None, after)


def _model_object(model: dict[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in model.items() if name not in ("id", "created")}
    return {
        "id": model["id"],
        "object": "model",
        "created": int(model.get("created", 0)),
        "owned_by": "mlx_sora",
        "mlx_sora": own,
    }


def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, MlxSoraError):
        return error_response(error)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        name = str(first["loc"][-1])[:80]
        message = f"{name} is wrong: {first['msg']}."
        return error_response(HttpError(400, "invalid_value", message, param=name))
    if isinstance(error, HTTPException):
        text = f"{request.method} {request.url.path[:80]}: {error.detail}."
        return error_response(HttpError(error.status_code, "not_found", text, "See /docs."))
    return error_response(HttpError(500, "internal", "The server failed.", "Its log says more."))
