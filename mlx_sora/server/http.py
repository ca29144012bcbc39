"""The web server: uvicorn with the application of a queue."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_sora.server.app import make_app
from mlx_sora.server.queue import JobQueue
from mlx_sora.server.security import Access

#: Seconds for the head of a request, and for what a client still sends after its answer.
HEAD_SECONDS = 15.0

#: Connections at a time; macOS lets a process open 256 files.
_CONNECTIONS = 200

#: Seconds that running requests may take when the server ends.
_LAST_SECONDS = 5


class Protocol(H11Protocol):
    """HTTP/1.1 that closes a connection on which no request is worked on for a while.

    uvicorn waits for ever for the end of a head, and reads for ever what follows a refused body.
    """

    seconds = HEAD_SECONDS

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.loop.call_later(self.seconds, self._close_if_idle, None)

    def _close_if_idle(self, before: Any) -> None:
        """Close if the last request is still `before`, None for none, and is answered."""
        if self.transport.is_closing():
            return
        if self.cycle is before and getattr(before, "response_complete", True):
            self.transport.abort()
            return
        self.loop.call_later(self.seconds, self._close_if_idle, self.cycle)


def serve(queue: JobQueue, access: Access, listener: socket.socket) -> None:
    """Serve a queue on a socket that listens, until SIGINT or SIGTERM."""
    make_server(queue, access).run([listener])


def make_server(queue: JobQueue, access: Access) -> uvicorn.Server:
    """Return the server of a queue."""
    config = uvicorn.Config(
        make_app(queue, access, lambda: server.should_exit),
        http=Protocol,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    server = uvicorn.Server(config)
    return server
