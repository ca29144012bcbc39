"""Guard: who may talk to the server, how often, how much and how slowly.

Browsers let any page send requests to this machine. A page from elsewhere betrays itself by its
Origin, or, after DNS rebinding, by the name in Host; both are checked for every request. From
other machines, a token is needed besides.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mlx_sora.server.http_errors import HttpError, error_response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Characters of the shortest token that a user may choose.
MIN_TOKEN = 16

#: Bytes of a body that is no upload: options and prompts.
MAX_BODY = 1_000_000

#: Seconds without a byte of a body, seconds that any body may take, and bytes per second beyond.
IDLE_SECONDS, BODY_SECONDS, BODY_SPEED = 20.0, 60.0, 10_000.0

#: Requests that change something, at a time; there are 40 threads.
_CHANGES = 16

#: Addresses whose rate is remembered.
_MAX_CLIENTS = 1024

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", re.ASCII | re.IGNORECASE)

#: Headers of every answer. Videos and pictures of others are not shown in its pages, nor its
#: pages in those of others.
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        b"media-src 'self' blob:; connect-src 'self'; manifest-src 'self'; form-action 'self'; "
        b"base-uri 'none'; frame-ancestors 'none'",
    ),
)


@dataclass(frozen=True)
class Access:
    """Rules of the guard.

    token: needed for all but /healthz and the files of the page; None: nobody needs one.
    listening: other machines may connect, by an address of this machine or one of `names`.
    rate: requests per minute of an address. max_upload: bytes of a body with a file. uploads: such
    bodies at a time.
    """

    token: str | None = None
    listening: bool = False
    names: tuple[str, ...] = ()
    rate: int = 12_000
    max_upload: int = (1 << 30) + MAX_BODY
    uploads: int = 4
    idle_seconds: float = IDLE_SECONDS

    def allows_host(self, host: str) -> bool:
        """Return whether a Host header names this server.

        An address is always right, as rebinding needs a name.
        """
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].strip("[]").rstrip(".").lower()
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name == "localhost" or name in self.names
        return self.listening or address.is_loopback


class Guard:
    """ASGI middleware that applies `Access` and bounds bodies."""

    def __init__(self, app: App, access: Access) -> None:
        self._app, self._access = app, access
        self._rates = _Rates(access.rate)
        self._uploads = 0
        #: What changes or plans may wait for the helper: it leaves threads to those who only look.
        self._changes = asyncio.Semaphore(_CHANGES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        try:
            self._check(scope, headers)
            is_upload = headers.get("content-type", "").startswith("multipart/")
            if is_upload and self._uploads >= self._access.uploads:
                raise HttpError(503, "busy", "Too many uploads at a time.", "Try again soon.")
            limit = self._access.max_upload if is_upload else MAX_BODY
            body = _Body(receive, limit, self._access.idle_seconds)
            body.check_length(headers.get("content-length", "0"))
        except HttpError as error:
            await error_response(error)(scope, receive, _with_headers(send))
            return
        self._uploads += is_upload
        looks = scope["method"] in ("GET", "HEAD", "OPTIONS")
        try:
            async with nullcontext() if looks else self._changes:
                await self._app(scope, body.receive, _with_headers(send))
        finally:
            self._uploads -= is_upload

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raise HttpError unless the request may pass."""
        host = headers.get("host", "")
        if not self._access.allows_host(host):
            raise HttpError(
                403,
                "wrong_host",
                f"This server is not called {host[:80]!r}.",
                "Use its address, or start it with --allow-host NAME.",
            )
        _check_origin(scope, headers, host)
        self._rates.count((scope.get("client") or ("",))[0])
        if self._access.token is not None and not _is_public(scope):
            self._check_token(scope, headers, self._access.token)

    def _check_token(self, scope: Scope, headers: dict[str, str], token: str) -> None:
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        offered = [bearer.strip()] if kind.lower() == "bearer" else []
        offered += cookie_values(headers.get("cookie", ""))
        if scope["path"] == "/" and scope["method"] == "GET":
            offered += _query_tokens(scope)
        if not any(same_token(each, token) for each in offered):
            raise HttpError(
                401,
                "wrong_token" if offered else "no_token",
                "The token is wrong." if offered else "A token is needed.",
                "Open the link that the server printed, or send Authorization: Bearer TOKEN.",
            )


def _is_public(scope: Scope) -> bool:
    """Return whether a request needs no token: the page as it is packaged asks for it itself."""
    path = str(scope["path"])
    if path == "/":
        return not _query_tokens(scope)
    return path == "/healthz" or path.startswith("/static/")


def _query_tokens(scope: Scope) -> list[str]:
    try:
        return parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=20).get("token", [])
    except ValueError:  # too many fields
        return []


#: Cookie with the token.
COOKIE = "mlx_sora_token"


def same_token(offered: str, token: str) -> bool:
    """Return whether tokens are the same, in a time that says nothing of where they differ."""
    return hmac.compare_digest(offered.encode("utf-8", "replace"), token.encode())


def cookie_values(header: str) -> list[str]:
    """Return the tokens in a Cookie header: none or one."""
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(header)
    except CookieError:
        return []
    return [cookies[COOKIE].value] if COOKIE in cookies else []


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _check_origin(scope: Scope, headers: dict[str, str], host: str) -> None:
    """Raise HttpError for what a page from elsewhere sends. A link to the page is fine."""
    origin = headers.get("origin")
    is_link = (
        scope["method"] == "GET"
        and scope["path"] in ("/", "/docs")
        and headers.get("sec-fetch-mode") == "navigate"
    )
    site = headers.get("sec-fetch-site", "none")
    same = site in ("none", "same-origin") or is_link
    if origin is not None:
        try:
            same = same and urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            same = False
    if not same:
        raise HttpError(
            403,
            "wrong_origin",
            "Pages of other sites may not use this server.",
            "Open its own page, or use a program.",
        )


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            present = {name for name, _ in message.get("headers", ())}
            more = [pair for pair in _HEADERS if pair[0] not in present]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return send_with_headers


class _Rates:
    """Requests per minute of each address: a bucket that fills steadily and holds a minute's."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        #: Requests left, and the time at which they were counted, the latest address last.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def count(self, client: str) -> None:
        """Count a request of `client`. Raises HttpError when there are too many."""
        now = time.monotonic()
        left, before = self._left.pop(client, (float(self._rate), now))
        left = min(self._rate, left + (now - before) * self._rate / 60)
        self._left[client] = (max(left - 1, 0.0), now)
        if len(self._left) > _MAX_CLIENTS:
            self._left.popitem(last=False)
        if left < 1:
            wait = max(1, round((1 - left) * 60 / self._rate))
            raise HttpError(
                429,
                "too_many_requests",
                f"More than {self._rate} requests per minute.",
                f"Wait {wait} s, or start the server with a larger --rate.",
                headers={"retry-after": str(wait)},
            )


class _Body:
    """The body of a request, read in bounded size and time."""

    def __init__(self, receive: Receive, limit: int, idle_seconds: float) -> None:
        self._receive, self._limit, self._idle_seconds = receive, limit, idle_seconds
        self._size, self._start, self._complete = 0, time.monotonic(), False

    def check_length(self, length: str) -> None:
        """Raise HttpError if the announced length is too large."""
        if not length.isdecimal() or len(length) > 18 or int(length) > self._limit:
            raise self._too_large()

    async def receive(self) -> MutableMapping[str, Any]:
        """Return the next message. Raises HttpError at the limits."""
        if self._complete:  # what comes now is the end of the connection
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._idle_seconds)
        except asyncio.TimeoutError:
            raise self._too_slow() from None
        self._complete = not message.get("more_body", False)
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise self._too_large()
        if time.monotonic() - self._start > BODY_SECONDS + self._size / BODY_SPEED:
            raise self._too_slow()
        return message

    def _too_large(self) -> HttpError:
        megabytes = f"{self._limit / 1e6:g} MB"
        return HttpError(413, "too_large", f"The body has over {megabytes}.", "Send less.")

    def _too_slow(self) -> HttpError:
        return HttpError(408, "too_slow", "The body arrives too slowly.", "Send it again.")
