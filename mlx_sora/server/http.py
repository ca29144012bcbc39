"""The web server: uvicorn with the application of a queue."""

from __future__ import annotations

import socket

import uvicorn

from mlx_sora.server.app import make_app
from mlx_sora.server.queue import JobQueue
from mlx_sora.server.security import Access

#: Connections at a time; macOS lets a process open 256 files.
_CONNECTIONS = 200

#: Seconds that running requests may take when the server ends.
_LAST_SECONDS = 5


def serve(queue: JobQueue, access: Access, listener: socket.socket) -> None:
    """Serve a queue on a socket that listens, until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        make_app(queue, access, lambda: server.should_exit),
        http="h11",
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
    server.run([listener])
