"""The page when its server ends and comes back, with a token, and with hundreds of videos."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from mlx_sora.server.folder import DATABASE
from mlx_sora.server.store import DONE, Job, Store
from mlx_sora.server.task import PlanSummary, Task, new_id
from tests.browser.actions import card, open_card, row, submit
from tests.browser.conftest import Open
from tests.helpers.server_process import ServerProcess, server_process

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import expect

VIDEOS = 200


@pytest.fixture(scope="module")
def full_folder(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a server with many finished pictures."""
    folder = tmp_path_factory.mktemp("full") / "videos"
    (folder / "videos").mkdir(parents=True)
    store = Store(folder / DATABASE)
    plan = PlanSummary(model="shapes", width=64, height=64, frames=1, fps=24, steps=30)
    for number in range(VIDEOS):
        id = new_id("video_")
        task = Task(options={"prompt": f"picture number {number}", "seed": number, "num_frames": 1})
        output = f"{id}.png"
        Image.new("RGB", (64, 64), (number, 80, 200 - number)).save(folder / "videos" / output)
        store.add(Job(id, task, DONE, created_at=number, model="shapes", output=output, plan=plan))
    store.close()
    return folder


@pytest.fixture(scope="module")
def server(full_folder: Path) -> Iterator[ServerProcess]:
    with server_process(full_folder, "--token", "a-token-for-the-tests") as server:
        yield server


def test_a_page_without_the_token_asks_for_it(open_page: Open, server: ServerProcess) -> None:
    page = open_page(f"{server.web.url}/")
    page.fill("#token-value", "a-wrong-token-for-tests")
    page.click("#token-form button")
    expect(page.locator("#token-error")).to_have_text("This is not its token.")
    page.fill("#token-value", "a-token-for-the-tests")
    page.click("#token-form button")
    page.locator(".card").first.wait_for()
    assert "token" not in page.url


def test_hundreds_of_videos_are_loaded_as_they_are_seen(
    open_page: Open, server: ServerProcess
) -> None:
    page = open_page(server.link)
    pictures: list[str] = []
    page.on("request", lambda r: pictures.append(r.url) if "thumbnail" in r.url else None)
    expect(page.locator(".card").first).to_contain_text(f"picture number {VIDEOS - 1}")
    page.wait_for_timeout(500)
    assert page.locator(".card").count() < VIDEOS
    assert 0 < len(pictures) < VIDEOS / 2
    end = time.monotonic() + 60
    while page.locator(".card").count() < VIDEOS and time.monotonic() < end:
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        page.wait_for_timeout(100)
    expect(page.locator(".card")).to_have_count(VIDEOS)
    expect(page.locator(".card").last).to_contain_text("picture number 0")
    expect(page.locator("#more")).to_be_hidden()
    viewer = open_card(page, "picture number 0")
    expect(viewer.locator("img")).to_have_js_property("naturalWidth", 64)
    page.keyboard.press("ArrowLeft")
    expect(viewer.locator("h2")).to_have_text("picture number 1")


def test_the_page_outlives_its_server(open_page: Open, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    with server_process(folder) as server:
        page = open_page(server.link)
        submit(page, "a long one", steps="600")
        expect(row(page, "a long one")).to_contain_text(re.compile(r"step [1-9]\d* of 600"))
        server.stop()
    expect(page.locator("#connection")).to_contain_text("Connection lost")
    page.fill("#prompt", "typed meanwhile")
    page.click("#submit")
    expect(page.locator("#form-error")).to_contain_text("python -m mlx_sora serve")
    with server_process(folder, "--port", str(server.web.port)):
        expect(page.locator("#connection")).to_have_text("")
        expect(row(page, "a long one")).to_contain_text(re.compile(r"step [1-9]\d* of 600"))
        expect(page.locator("#prompt")).to_have_value("typed meanwhile")
        row(page, "a long one").get_by_text("Cancel").click()
        card(page, "a long one").wait_for()
