"""The server in a thread, and plain requests to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from mlx_sora.cli.serve import open_socket
from mlx_sora.server.http import make_server
from mlx_sora.server.queue import JobQueue
from mlx_sora.server.security import Access


@dataclass(frozen=True)
class Answer:
    """Status, headers and body of an answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Code of an error."""
        return str(self.json["error"]["code"])


@dataclass(frozen=True)
class Web:
    """A server that listens on a port of this machine."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request; a body that is no text or bytes is sent as JSON."""
        given = dict(headers or {})
        if body is not None and not isinstance(body, (str, bytes)):
            body, given = json.dumps(body), {"Content-Type": "application/json", **given}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            assert "event-stream" not in names.get("content-type", ""), "it has no end"
            return Answer(answer.status, names, answer.read())
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any) -> Answer:
        return self.request("POST", path, body)


@contextmanager
def serving(queue: JobQueue, access: Access | None = None) -> Iterator[Web]:
    """Serve a queue in a thread inside the block."""
    with open_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = make_server(queue, access or Access())
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield Web(port)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def form(fields: Mapping[str, Any], boundary: str = "xxboundaryxx") -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of a form; a value of (name, bytes) is a file."""
    parts = []
    for name, value in fields.items():
        file = isinstance(value, tuple)
        more = f'; filename="{value[0]}"' if file else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
        parts.append(head.encode() + (value[1] if file else str(value).encode()) + b"\r\n")
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
