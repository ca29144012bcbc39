"""Errors of the HTTP API: a status and a code, besides the line and the fix of every error."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

from mlx_sora.errors import MemoryBudgetError, MlxSoraError, UsageError, WeightsError, printable
from mlx_sora.server.task import ConflictError, NotFoundError, QueueFullError

#: Status and code of each error; the first class that fits counts.
_KINDS: tuple[tuple[type[MlxSoraError], int, str], ...] = (
    (NotFoundError, 404, "not_found"),
    (QueueFullError, 429, "queue_full"),
    (ConflictError, 409, "wrong_state"),
    (MemoryBudgetError, 400, "does_not_fit"),
    (WeightsError, 400, "model_unavailable"),
    (UsageError, 400, "invalid_value"),
    (MlxSoraError, 500, "run_failed"),
)


class HttpError(MlxSoraError):
    """An error that HTTP has a status for. param: field of the body that caused it."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        fix: str = "",
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, fix)
        self.status, self.code = status, code
        self.param = None if param is None else printable(param, 100)
        self.headers = dict(headers or {})


def error_response(error: MlxSoraError) -> JSONResponse:
    """Return the answer for an error, in the form of the video API."""
    param, headers = None, {}
    if isinstance(error, HttpError):
        status, code, param, headers = error.status, error.code, error.param, error.headers
    else:
        status, code = next((s, c) for kind, s, c in _KINDS if isinstance(error, kind))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    # Clients retry by themselves what may pass a moment later; the rest would fail again.
    if code in ("queue_full", "wrong_state", "run_failed"):
        headers["x-should-retry"] = "false"
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"message": str(error), "type": kind, "param": param, "code": code}
    return JSONResponse({"error": body}, status, headers)
