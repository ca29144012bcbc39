"""Who may use the server, how much and how fast: hosts, origins, tokens, sizes, rates, paths."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mlx_sora.server.http import Protocol
from mlx_sora.server.security import Access
from tests.helpers.fake_queue import FakeQueue
from tests.helpers.web import Web, form, serving

TOKEN = "a-token-of-enough-letters"
VIDEO = {"prompt": "a red circle"}


@pytest.fixture
def guarded(queue: FakeQueue) -> Iterator[Web]:
    """A server that other machines may reach, with a token."""
    with serving(queue, Access(TOKEN, listening=True, names=("mac", "mac.local"))) as web:
        yield web


@pytest.mark.parametrize(
    ("host", "local", "listening"),
    [
        ("127.0.0.1:8420", True, True),
        ("localhost", True, True),
        ("LOCALHOST.:1", True, True),
        ("[::1]:8420", True, True),
        ("192.168.1.5:8420", False, True),
        ("[fe80::1]:8420", False, True),
        ("0.0.0.0", False, True),
        ("mac.local:8420", False, True),
        ("MAC", False, True),
        ("evil.example", False, False),
        ("localhost.evil.example", False, False),
        ("127.0.0.1.evil.example", False, False),
        ("mac.local.evil.example", False, False),
        ("127.1", False, False),
        ("2130706433", False, False),
        ("localhost@evil.example", False, False),
        ("localhost:80:80", False, False),
        ("", False, False),
    ],
)
def test_names_of_the_server(host: str, local: bool, listening: bool) -> None:
    assert Access().allows_host(host) is local
    assert Access(listening=True, names=("mac", "mac.local")).allows_host(host) is listening


@pytest.mark.parametrize("path", ["/", "/v1/videos", "/healthz", "/static/app.js", "/docs"])
def test_a_name_that_was_bound_anew_is_refused(path: str, web: Web) -> None:
    answer = web.get(path, {"Host": f"evil.example:{web.port}"})
    assert (answer.status, answer.code) == (403, "wrong_host")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    ],
)
def test_other_sites_may_not_send(headers: dict[str, str], web: Web, queue: FakeQueue) -> None:
    body, kind = form(VIDEO)
    answer = web.request("POST", "/v1/videos", body, {**headers, **kind})
    assert (answer.status, answer.code) == (403, "wrong_origin")
    assert queue.list() == []
    assert web.get("/v1/videos", headers).status == 403


def test_the_own_page_may_send_and_links_lead_to_it(web: Web) -> None:
    own = {"Origin": web.url, "Sec-Fetch-Site": "same-origin", "Content-Type": "application/json"}
    assert web.request("POST", "/v1/videos", '{"prompt": "a"}', own).status == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert web.get("/docs", link).status == 200


def test_a_preflight_of_another_site_gets_no_permission(web: Web) -> None:
    answer = web.request("OPTIONS", "/v1/videos", headers={"Origin": "http://evil.example"})
    assert answer.status == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "no_token"),
        ({"Authorization": "Bearer wrong"}, "wrong_token"),
        ({"Authorization": "Bearer "}, "wrong_token"),
        ({"Authorization": f"Basic {TOKEN}"}, "no_token"),
        ({"Authorization": "Bearer \xff"}, "wrong_token"),
        ({"Cookie": "mlx_sora_token=wrong"}, "wrong_token"),
        ({"Cookie": "mlx_sora_token"}, "no_token"),
    ],
)
def test_without_the_token_nothing_is_there(
    headers: dict[str, str], code: str, guarded: Web
) -> None:
    for path in ("/v1/videos", "/v1/files/file-0", "/docs", "/openapi.json", "/none"):
        answer = guarded.get(path, headers)
        assert (answer.status, answer.code) == (401, code)
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/", "/static/app.js", f"/?{'a=1&' * 30}"):  # which say nothing
        assert guarded.get(path, headers).status == 200


def test_the_token_as_a_header_and_in_the_link(guarded: Web) -> None:
    assert guarded.get("/v1/videos", {"Authorization": f"Bearer {TOKEN}"}).status == 200
    answer = guarded.get(f"/?token={TOKEN}")
    assert answer.status == 200
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
    assert TOKEN not in answer.body.decode()
    kept = {"Cookie": cookie.partition(";")[0]}
    assert guarded.get("/v1/videos", kept).status == 200
    assert guarded.get(f"/v1/videos?token={TOKEN}").status == 401  # links may be written down
    assert guarded.get("/?token=wrong").status == 401


@pytest.mark.parametrize(
    "query", ["token", "token=", f"{'a=1&' * 30}token=x", "token=x&token=", "TOKEN=x", "token=%ff"]
)
def test_no_link_without_the_token_gives_a_cookie(query: str, guarded: Web) -> None:
    for more in ({}, {"Cookie": f"mlx_sora_token={TOKEN}"}):
        assert "set-cookie" not in guarded.get(f"/?{query}", more).headers


@pytest.mark.parametrize(
    "path",
    [
        "/static/../security.py",
        "/static/..%2fsecurity.py",
        "/static/%2e%2e%2fsecurity.py",
        "/static/%2fetc%2fpasswd",
        "/static/.",
        "/static/",
        "/static/app.js%00.css",
        "/v1/videos/..%2f..%2fjobs.db/content",
        "/v1/videos/%2e%2e/content",
        "/v1/files/..%2fjobs.db/content",
        "/v1/files//etc/passwd/content",
        "//etc/passwd",
    ],
)
def test_no_path_leads_out(path: str, web: Web) -> None:
    answer = web.get(path)
    assert answer.status in (404, 400)
    assert answer.json["error"]["message"]


@pytest.mark.parametrize("id", ["../x", "video_../../x", "video_" + "a" * 10_000, "file-", "x\n"])
def test_no_identifier_leads_out(id: str, web: Web) -> None:
    for field in ({"images": [[id]]}, {"videos": [id]}, {"input_reference": {"file_id": id}}):
        answer = web.post("/v1/videos", {**VIDEO, **field})
        assert (answer.status, answer.code) == (400, "invalid_value")
        assert len(answer.json["error"]["message"]) < 300


def test_a_name_of_a_file_is_only_a_name(web: Web, queue: FakeQueue) -> None:
    body = form({"file": ("../../../etc/cron.d/x.png", b"picture")})
    file = web.request("POST", "/v1/files", *body).json
    assert (queue.folder / file["id"]).read_bytes() == b"picture"
    assert sorted(p.name for p in queue.folder.iterdir()) == [file["id"]]


def test_large_bodies_are_refused(tmp_path: Path) -> None:
    queue = FakeQueue(tmp_path)
    with serving(queue, Access(max_upload=200_000)) as web:
        long = {"prompt": "a" * 1_100_000}
        assert (web.post("/v1/videos", long).status) == 413
        body, kind = form({"file": ("a.png", b"picture" + b"x" * 300_000)})
        answer = web.request("POST", "/v1/files", body, kind)
        assert (answer.status, answer.code) == (413, "too_large")
        body, kind = form({"file": ("a.png", b"picture" + b"x" * 100_000)})
        assert web.request("POST", "/v1/files", body, kind).status == 200
        assert [len(data) for data in queue.received] == [100_007]


def test_a_body_that_does_not_say_its_length_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Protocol, "seconds", 0.3)
    with (
        serving(FakeQueue(tmp_path), Access(max_upload=200_000)) as web,
        socket.create_connection(("127.0.0.1", web.port), timeout=20) as connection,
    ):
        head = "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        deadline = time.monotonic() + 20
        with pytest.raises(OSError):  # noqa: PT011, PT012 (the server closes the connection)
            while time.monotonic() < deadline:
                connection.sendall(chunk)


@pytest.mark.parametrize("start", ["", "GET / HT", "GET / HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_stops_is_given_up(
    start: str, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Protocol, "seconds", 0.3)
    with socket.create_connection(("127.0.0.1", web.port), timeout=10) as connection:
        connection.sendall(start.encode())
        with suppress(ConnectionResetError):
            assert connection.recv(10) == b""


def test_a_long_answer_is_not_given_up(
    web: Web, queue: FakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Protocol, "seconds", 0.3)
    with socket.create_connection(("127.0.0.1", web.port), timeout=10) as connection:
        connection.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(1)
        queue.tell("video_0", {"event": "note"})
        received = b""
        while b"note" not in received:
            part = connection.recv(1000)
            assert part, "the server has given the answer up"
            received += part


@pytest.mark.parametrize(("parts", "files"), [(300, 0), (0, 20)], ids=["many fields", "many files"])
def test_a_form_of_many_parts_is_refused(parts: int, files: int, web: Web) -> None:
    fields: dict[str, Any] = {f"f{i}": "x" for i in range(parts)}
    fields |= {f"g{i}": ("a.png", b"picture") for i in range(files)}
    answer = web.request("POST", "/v1/files", *form(fields))
    assert (answer.status, answer.code) == (400, "malformed")


def test_a_body_that_stops_is_given_up(tmp_path: Path) -> None:
    with (
        serving(FakeQueue(tmp_path), Access(idle_seconds=0.3)) as web,
        socket.create_connection(("127.0.0.1", web.port), timeout=20) as connection,
    ):
        head = "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in connection.recv(1000).splitlines()[0]


def test_uploads_at_a_time_are_bounded(tmp_path: Path) -> None:
    with (
        serving(FakeQueue(tmp_path), Access(uploads=1)) as web,
        socket.create_connection(("127.0.0.1", web.port), timeout=20) as connection,
    ):
        body, kind = form({"file": ("a.png", b"picture")})
        head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind['Content-Type']}"
        connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        deadline = time.monotonic() + 10
        while (answer := web.request("POST", "/v1/files", body, kind)).status != 503:
            assert time.monotonic() < deadline
        assert answer.code == "busy"
        connection.sendall(body)
        assert b" 200 " in connection.recv(1000).splitlines()[0]
        assert web.request("POST", "/v1/files", body, kind).status == 200


def test_status_comes_while_many_wait_for_a_plan(web: Web, queue: FakeQueue) -> None:
    queue.pause = threading.Event()
    planners = [threading.Thread(target=web.post, args=("/v1/plan", VIDEO)) for _ in range(50)]
    try:
        for planner in planners:
            planner.start()
        time.sleep(0.3)
        start = time.monotonic()
        assert web.get("/v1/videos").status == 200
        assert time.monotonic() - start < 2
    finally:
        queue.pause.set()
        for planner in planners:
            planner.join()


def test_too_many_requests(tmp_path: Path) -> None:
    with serving(FakeQueue(tmp_path), Access(rate=60)) as web:
        answers = [web.get("/healthz") for _ in range(75)]
        refused = [answer for answer in answers if answer.status == 429]
        assert refused
        assert (refused[0].code, refused[0].headers["retry-after"]) == ("too_many_requests", "1")
        assert all(answer.status == 200 for answer in answers[:60])
        time.sleep(1.1)
        assert web.get("/healthz").status == 200


def test_every_answer_forbids_what_pages_could_do_with_it(web: Web, queue: FakeQueue) -> None:
    for path in ("/", "/docs", "/v1/videos", "/none"):
        headers = web.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy


def test_a_file_of_others_runs_nothing(web: Web) -> None:
    file = web.request("POST", "/v1/files", *form({"file": ("a.html", b"picture<script>")})).json
    headers = web.get(f"/v1/files/{file['id']}/content").headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-security-policy"].endswith("sandbox")


def test_the_page_and_the_documentation_ask_no_other_host(web: Web) -> None:
    for path in ("/", "/docs"):
        text = web.get(path).body.decode()
        assert "://" not in text
        assert "</html>" in text
    docs = web.get("/docs").body.decode()
    for word in ("POST /v1/videos/edits", "num_frames", "input_reference", "last 17 frames"):
        assert word in docs
    api = web.get("/openapi.json").json
    body = api["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"]["properties"]["steps"]["type"] == "integer"
    assert body.keys() == {"application/json", "multipart/form-data"}
