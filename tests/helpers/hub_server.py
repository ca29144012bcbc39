"""A hub on 127.0.0.1 that speaks the protocol of huggingface.co as far as downloads need it.

Model information with sizes and checksums; `resolve`, which redirects files in LFS to a second
server (the "CDN") and serves others itself; HEAD, Range, ETag and the X- headers. `Faults` say what
goes wrong; `requests` records what was asked.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def in_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".model", ".bin"))


@dataclass
class Repo:
    """One repository: branch, tag or commit to files; every revision has the commit of its name."""

    files: dict[str, bytes]
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def at(self, revision: str) -> dict[str, bytes] | None:
        named = {"main": self.files, **self.revisions}
        named |= {commit_of(name): files for name, files in named.items()}
        return named.get(revision)


def commit_of(revision: str) -> str:
    """The commit that a revision's name stands for; a commit stands for itself."""
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else git_sha1(revision.encode())


@dataclass
class Faults:
    """What goes wrong, by the file's name in its repository."""

    #: Bytes after which the connection is cut, one entry per request.
    cuts: dict[str, list[int]] = field(default_factory=dict)
    #: Bytes after which the server waits for `FakeHub.resume`.
    stalls: dict[str, int] = field(default_factory=dict)
    #: Content served in place of the announced one.
    content: dict[str, bytes] = field(default_factory=dict)
    #: Fields of the listing that are replaced (None: left out).
    listing: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Names added to every listing.
    names: list[str] = field(default_factory=list)
    #: Status (and X-Error-Code) of requests for a repository or a file.
    status: dict[str, tuple[int, str]] = field(default_factory=dict)
    #: As `status`, but for the first requests only.
    moments: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    #: Range headers are ignored: every answer is the whole file.
    no_ranges: bool = False
    #: The body of every listing.
    nonsense: bytes | None = None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]  # by Title-Case name


class FakeHub:
    """The state that both servers share."""

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos, self.faults = repos, Faults()
        self.requests: list[Request] = []
        self.bytes_served = 0
        self.endpoint = self.cdn = ""
        self.resumed = threading.Event()

    def resume(self) -> None:
        """Let stalled answers go on; there will be no others."""
        self.faults.stalls.clear()
        self.resumed.set()

    def asked(self, method: str, word: str) -> list[Request]:
        return [r for r in self.requests if r.method == method and word in r.path]

    def listing(self, repo: str, revision: str, files: dict[str, bytes]) -> dict[str, Any]:
        siblings = []
        for name in [*files, *self.faults.names]:
            content = files.get(name, b"")
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            entry["blobId"] = git_sha1(content)
            if in_lfs(name):
                entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 1}
            entry |= self.faults.listing.get(name, {})
            siblings.append({key: value for key, value in entry.items() if value is not None})
        return {
            "id": repo,
            "modelId": repo,
            "sha": commit_of(revision),
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 1,
            "likes": 1,
            "tags": [],
            "siblings": siblings,
        }


class HubServer(ThreadingHTTPServer):
    """One of the two servers, on a free port."""

    daemon_threads = True

    def __init__(self, hub: FakeHub, is_cdn: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.is_cdn = hub, is_cdn


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub or, where the server's `is_cdn` is set, for its CDN."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    @property
    def hub(self) -> FakeHub:
        return self.server.hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {key.title(): value for key, value in self.headers.items()}
        self.hub.requests.append(Request(self.command, path, headers))
        if self.server.is_cdn:
            self._content(path.removeprefix("/cdn/"))
        elif match := API.fullmatch(path):
            self._information(match["repo"], match["revision"] or "main")
        elif match := RESOLVE.fullmatch(path):
            self._resolve(match["repo"], match["revision"], match["name"])
        else:
            self._fail(404, "")

    def _refused(self, *names: str) -> bool:
        for name in names:
            status = self.hub.faults.status.get(name)
            if self.hub.faults.moments.get(name):
                status = self.hub.faults.moments[name].pop(0)
            if status is not None:
                self._fail(*status)
                return True
        return False

    def _information(self, repo: str, revision: str) -> None:
        if self._refused(repo):
            return
        if repo not in self.hub.repos:
            self._fail(401, "RepoNotFound")
            return
        files = self.hub.repos[repo].at(revision)
        if files is None:
            self._fail(404, "RevisionNotFound")
            return
        body = self.hub.faults.nonsense
        if body is None:
            body = json.dumps(self.hub.listing(repo, revision, files)).encode()
        self._send(200, {"Content-Type": "application/json"}, body)

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if self._refused(repo, name):
            return
        files = self.hub.repos[repo].at(revision) or {}
        if name not in files:
            self._fail(404, "EntryNotFound")
            return
        content = files[name]
        headers = {"X-Repo-Commit": commit_of(revision), "Accept-Ranges": "bytes"}
        if not in_lfs(name):
            headers["ETag"] = f'"{git_sha1(content)}"'
            self._body(name, content, headers)
            return
        headers["X-Linked-Etag"] = f'"{sha256(content)}"'
        headers["X-Linked-Size"] = str(len(content))
        headers["Location"] = f"{self.hub.cdn}/cdn/{repo}/{revision}/{name}"
        self._send(302, headers, b"")

    def _content(self, path: str) -> None:
        owner, repo, revision, name = path.split("/", 3)
        files = self.hub.repos[f"{owner}/{repo}"].at(revision) or {}
        self._body(name, files[name], {"ETag": f'"{sha256(files[name])}"'})

    def _body(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        content = self.hub.faults.content.get(name, content)
        start, status = 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and not self.hub.faults.no_ranges:
            start, status = int(wanted[1]), 206
            if start >= len(content):
                self._fail(416, "")
                return
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cuts = self.hub.faults.cuts.get(name, [])
        cut = cuts.pop(0) if cuts and self.command == "GET" else None
        stall = self.hub.faults.stalls.get(name)
        if stall is not None and self.command == "GET":
            self._stall(content[start:], stall)
            return
        self._send(status, headers, content[start:], cut)

    def _stall(self, body: bytes, after: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:after])
        self.hub.resumed.wait(60)
        self.close_connection = True

    def _send(
        self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[:cut]
        if status in (200, 206) and "ETag" in headers:
            self.hub.bytes_served += len(body)
        self.wfile.write(body)
        if cut is not None:
            self.close_connection = True

    def _fail(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code} if code else {}, b"")


@contextmanager
def serve(repos: dict[str, Repo]) -> Iterator[FakeHub]:
    """The hub and its CDN on two free ports of 127.0.0.1, until the block ends."""
    hub = FakeHub(repos)
    servers = [HubServer(hub, is_cdn) for is_cdn in (False, True)]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
