"""What a person does with the page, and what a test asks the server."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from tests.helpers.server_process import ServerProcess

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page


def set_option(page: Page, name: str, value: str) -> None:
    """Set one of "All options"."""
    if not page.locator("#options").is_visible():
        page.click("#all > summary")
    page.fill(f"#option-{name}", value)


def submit(page: Page, prompt: str, **options: str) -> None:
    """Fill in a prompt and options, and send the request."""
    page.fill("#prompt", prompt)
    for name, value in options.items():
        set_option(page, name, value)
    with page.expect_response(re.compile("/v1/videos(/edits|/extensions)?$")) as answer:
        page.click("#submit")
    assert answer.value.ok, answer.value.text()


def row(page: Page, prompt: str) -> Locator:
    """Return the row of a video in the queue."""
    return page.locator(".job", has_text=prompt)


def card(page: Page, prompt: str) -> Locator:
    """Return the card of a video in the gallery."""
    return page.locator(".card", has_text=prompt)


def open_card(page: Page, prompt: str) -> Locator:
    """Open a finished video, or one that stopped; return the dialog."""
    card(page, prompt).first.locator("button").click()
    viewer = page.locator("#viewer")
    viewer.wait_for()
    return viewer


def press(scope: Locator, text: str) -> None:
    """Press a button by its name."""
    scope.get_by_role("button", name=text, exact=True).click()


def delete(page: Page, prompt: str) -> None:
    """Delete a video, and say yes."""
    press(open_card(page, prompt), "Delete")
    press(page.locator("#confirm"), "Delete")
    card(page, prompt).wait_for(state="detached")


def call(server: ServerProcess, method: str, path: str, body: Any = None) -> Any:
    """Return the JSON that the API answers."""
    answer = server.web.request(method, path, body)
    assert answer.status == 200, answer.body
    return answer.json


def video_ids(server: ServerProcess) -> set[str]:
    """Return the identifiers of the newest hundred videos."""
    return {video["id"] for video in call(server, "GET", "/v1/videos?limit=100")["data"]}


def wait_until_done(server: ServerProcess, id: str, seconds: float = 120) -> None:
    """Wait until a video is neither queued nor running."""
    end = time.monotonic() + seconds
    while call(server, "GET", f"/v1/videos/{id}")["status"] in ("queued", "in_progress"):
        assert time.monotonic() < end, f"{id} is not finished"
        time.sleep(0.1)
