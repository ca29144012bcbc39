"""Server-sent events."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from mlx_sora.server.events import MAX_STREAMS
from tests.helpers.fake_queue import FakeQueue
from tests.helpers.web import Web, serving


@contextmanager
def stream(web: Web, path: str, last: int | None = None) -> Iterator[Iterator[Any]]:
    """Yield the events of a path as they come, with their numbers."""
    more = "" if last is None else f"Last-Event-ID: {last}\r\n"
    with socket.create_connection(("127.0.0.1", web.port), timeout=20) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode())
        yield events(connection)


def events(connection: socket.socket) -> Iterator[Any]:
    number = None
    with connection.makefile("rb") as lines:
        for line in lines:
            if line.startswith(b"id: "):
                number = int(line[4:])
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                assert event["number"] == number
                yield event


def submit(web: Web) -> str:
    return str(web.post("/v1/videos", {"prompt": "a"}).json["id"])


def test_events_of_a_video_come_all_and_at_once(web: Web, queue: FakeQueue) -> None:
    id = submit(web)
    submit(web)
    queue.tell(id, {"event": "step_finished", "step": 0})
    with stream(web, f"/v1/videos/{id}/events") as found:
        assert next(found)["state"] == "queued"
        assert next(found)["event"] == "step_finished"
        start = time.monotonic()
        queue.tell(id, {"event": "step_finished", "step": 1})
        assert next(found)["step"] == 1
        assert time.monotonic() - start < 0.8  # less than the wait for the next sign of life


def test_a_stream_goes_on_behind_the_last_event(web: Web, queue: FakeQueue) -> None:
    id = submit(web)
    for step in range(5):
        queue.tell(id, {"event": "step_finished", "step": step})
    with stream(web, f"/v1/videos/{id}/events", last=4) as found:
        assert [next(found)["step"] for _ in range(2)] == [3, 4]
    with stream(web, "/v1/events", last=5) as found:
        assert next(found)["step"] == 4
    with stream(web, "/v1/events?after=3") as found:
        assert next(found)["step"] == 2


def test_all_videos_share_a_stream_that_begins_now(web: Web, queue: FakeQueue) -> None:
    submit(web)
    with stream(web, "/v1/events") as found:
        threading.Timer(0.5, lambda: submit(web)).start()
        event = next(found)
    assert event["id"] == queue.list()[0].id
    assert event["number"] == 2


def test_a_number_that_no_event_has_is_a_line(web: Web) -> None:
    for number in ("-1", "9" * 30, "x"):
        assert web.get(f"/v1/events?after={number}").json["error"]["param"] == "after"


def test_a_video_that_does_not_exist_has_no_events(web: Web) -> None:
    assert web.get("/v1/videos/video_0/events").code == "not_found"


def test_the_server_ends_in_spite_of_open_streams(queue: FakeQueue) -> None:
    with serving(queue) as web, stream(web, f"/v1/videos/{submit(web)}/events") as found:
        next(found)
        start = time.monotonic()
    assert time.monotonic() - start < 4


def test_streams_are_bounded_and_end_when_clients_leave(queue: FakeQueue) -> None:
    with serving(queue) as web:  # none of other tests is still ending there
        id = submit(web)
        with ExitStack() as opened:
            path = f"/v1/videos/{id}/events"
            count = 0
            while next(opened.enter_context(stream(web, path)), None) is not None:
                count += 1
            assert count == MAX_STREAMS
            assert web.get("/v1/events").code == "busy"
            assert web.get(f"/v1/videos/{id}").status == 200
        deadline = time.monotonic() + 15
        while True:
            queue.tell(id, {"event": "note"})
            with stream(web, f"/v1/videos/{id}/events") as found:
                if next(found, None) is not None:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.1)
