"""A real Chromium, a server, and pages whose errors fail the test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.browser.actions import call, video_ids
from tests.helpers.server_process import ServerProcess, server_process

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

#: Names under which systems have Chromium.
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")

#: Milliseconds for what a test waits for: a video takes seconds, on a busy machine several.
PATIENCE = 40_000

Open = Callable[..., "Page"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"there is no Chromium: {', '.join(PROGRAMS)}")
    flags = ["--disable-dev-shm-usage", "--disable-gpu"]
    flags += ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        sync_api.expect.set_options(timeout=PATIENCE)
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of the bundled model. It takes the browser first: without one, nothing starts."""
    with server_process(tmp_path_factory.mktemp("server") / "videos") as server:
        yield server


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """A function that opens an address in a context of its own.

    Errors of scripts, what the content security policy refuses, and requests to other hosts fail
    the test at its end.
    """
    contexts, problems = [], list[str]()

    def note(page: Page, host: str) -> None:
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: _note_console(message, problems))
        page.on("request", lambda request: _note_host(request.url, host, problems))

    def open_address(address: str, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        context.on("page", lambda page: note(page, urlsplit(address).netloc))
        page = context.new_page()
        page.goto(address)
        return page

    yield open_address
    for context in contexts:
        context.close()
    assert problems == []


def _note_console(message: Any, problems: list[str]) -> None:
    # Chromium logs every answer of 400 and above, and lost connections, which tests cause.
    expected = ("Failed to load resource", "net::ERR")
    if message.type == "error" and not any(text in message.text for text in expected):
        problems.append(message.text)


def _note_host(address: str, host: str, problems: list[str]) -> None:
    parts = urlsplit(address)
    if parts.scheme in ("http", "https", "ws") and parts.netloc != host:
        problems.append(f"request to {address}")


@pytest.fixture
def page(open_page: Open, server: ServerProcess) -> Iterator[Page]:
    """The page, with its form and the model's prompts in it. Videos that a test adds go with it."""
    before = video_ids(server)
    page = open_page(server.link)
    page.locator("#examples button").first.wait_for()
    yield page
    for id in video_ids(server) - before:
        call(server, "DELETE", f"/v1/videos/{id}")
