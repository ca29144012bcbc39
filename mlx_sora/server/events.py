"""Server-sent events of jobs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import anyio.to_thread
from starlette.responses import StreamingResponse

from mlx_sora.server.http_errors import HttpError
from mlx_sora.server.queue import JobQueue

#: Streams at a time; each waits in a thread of its own.
MAX_STREAMS = 100

#: Seconds between signs of life, which also find out that a client is gone.
QUIET_SECONDS = 5.0

#: What stands for the end of the events.
_END: dict[str, Any] = {}


class EventStreams:
    """The open streams of a server. closing: True once it ends, so that they end too."""

    def __init__(self, queue: JobQueue, closing: Callable[[], bool]) -> None:
        self._queue, self._closing, self._open = queue, closing, 0

    def response(self, id: str | None, after: int | None) -> StreamingResponse:
        """Return a stream of the events of one job or of all, behind event number `after`."""
        if self._open >= MAX_STREAMS:
            raise HttpError(503, "busy", "Too many streams of events.", "Close some pages.")
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(
            self._stream(id, after), headers=headers, media_type="text/event-stream"
        )

    async def _stream(self, id: str | None, after: int | None) -> AsyncIterator[str]:
        self._open += 1
        limiter = anyio.CapacityLimiter(1)
        events = self._queue.subscribe(id, after, timeout=1)
        quiet = 0.0
        try:
            yield "retry: 1000\n\n"
            while not self._closing():
                event = await anyio.to_thread.run_sync(_next, events, limiter=limiter)
                if event is _END:
                    break
                if event is not None:
                    yield _text(event)
                    quiet = 0.0
                elif (quiet := quiet + 1) >= QUIET_SECONDS:
                    yield ": \n\n"
                    quiet = 0.0
        finally:
            self._open -= 1


def _next(events: Iterator[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the next event, None after a quiet second, or _END."""
    return next(events, _END)


def _text(event: dict[str, Any]) -> str:
    return f"id: {event['number']}\ndata: {json.dumps(event)}\n\n"
