"""Files that are dropped on the page or chosen, and how the page looks and reads."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from mlx_sora import Pipeline
from tests.browser.actions import call, card, open_card, press, submit
from tests.browser.conftest import Open
from tests.helpers.server_process import ServerProcess

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import expect

PROMPT = "a white square shrinking on a navy background"

#: Impacts of axe's findings that fail a test.
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def video(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video that mlx_sora made, with its request in it."""
    path = tmp_path_factory.mktemp("made") / "square.mp4"
    pipe(PROMPT, seed=11, steps=3, guidance=2.5, output=path)
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "<b>navy.png"
    Image.new("RGB", (64, 64), "navy").save(path)
    return path


def drop(target: Locator, *paths: Path) -> None:
    """Drop files on an element, as a browser does when they come from the desktop."""
    files = [[path.name, base64.b64encode(path.read_bytes()).decode()] for path in paths]
    transfer = target.page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, data] of files) {
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                transfer.items.add(new File([bytes], name));
            }
            return transfer;
        }""",
        files,
    )
    for event in ("dragenter", "dragover", "drop"):
        target.dispatch_event(event, {"dataTransfer": transfer})


def test_a_dropped_video_of_mlx_sora_fills_the_form(page: Page, video: Path) -> None:
    drop(page.locator("#gallery-title"), video)
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    expect(page.locator("#option-seed")).to_have_value("11")
    expect(page.locator("#option-steps")).to_have_value("3")
    expect(page.locator("#option-guidance")).to_have_value("2.5")
    expect(page.locator("#drop-cover")).to_be_hidden()
    expect(page.locator("#media-list li")).to_have_count(0)
    page.get_by_text("Use the file itself").click()
    expect(page.locator("#media-list li")).to_contain_text("square.mp4 (64×64, 17 frames)")


def test_dropped_and_chosen_files_are_used_in_their_frames(
    page: Page, server: ServerProcess, picture: Path, video: Path
) -> None:
    drop(page.locator("#media"), picture)
    items = page.locator("#media-list li")
    expect(items).to_contain_text([picture.name])
    page.set_input_files("#files", [picture, video])
    expect(items).to_have_count(3)
    expect(items.nth(1).locator("select")).to_have_value("last")
    items.nth(1).locator("select").select_option("number")
    items.nth(1).get_by_label("Number").fill("20")
    items.nth(1).get_by_label("Strength").fill("0.5")
    press(items.nth(0), f"Remove {picture.name}")
    expect(items).to_have_count(2)
    page.select_option("#length", "34")
    expect(page.locator("#plan")).to_contain_text("34 frames")
    submit(page, "with files", steps="2")
    card(page, "with files").wait_for()
    options = call(server, "GET", "/v1/videos")["data"][0]["mlx_sora"]["options"]
    assert [item[1:] for item in options["images"]] == [[20, 0.5]]
    assert [item[1:] for item in options["videos"]] == [["before", 17, 1.0]]
    press(open_card(page, "with files"), "Change this")
    expect(items).to_have_count(2)
    expect(items.nth(0)).to_contain_text(picture.name)
    expect(items.nth(0).get_by_label("Number")).to_have_value("20")


def test_a_file_that_is_no_picture_is_refused_in_a_line(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    page.set_input_files("#files", tmp_path / "notes.txt")
    expect(page.locator(".toast")).to_contain_text("notes.txt: ")
    expect(page.locator("#media-list li")).to_have_count(0)


def test_nothing_is_wider_than_a_phone(open_page: Open, server: ServerProcess) -> None:
    page = open_page(server.link, viewport={"width": 360, "height": 740}, has_touch=True)
    page.locator("#examples button").first.wait_for()
    page.click("#all > summary")
    assert width_of(page) == 360
    submit(page, "on a phone with a long word " + "x" * 80, steps="2")
    card(page, "on a phone").wait_for()
    viewer = open_card(page, "on a phone")
    assert width_of(page) == 360
    assert viewer.evaluate("node => node.scrollWidth <= node.clientWidth")


def width_of(page: Page) -> Any:
    return page.evaluate("document.documentElement.scrollWidth")


def test_the_theme_follows_the_system_or_the_switch(open_page: Open, server: ServerProcess) -> None:
    page = open_page(server.link, color_scheme="dark")
    dark = colour(page)
    page.select_option("#theme", "light")
    light = colour(page)
    assert light != dark
    page.reload()
    assert colour(page) == light
    page.select_option("#theme", "auto")
    assert colour(page) == dark


def colour(page: Page) -> Any:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(
    open_page: Open, server: ServerProcess, picture: Path, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(server.link, color_scheme=scheme)
    page.locator("#examples button").first.wait_for()
    page.set_input_files("#files", picture)
    page.click("#all > summary")
    submit(page, f"seen by axe, {scheme}", steps="400")
    submit(page, "axe waits", steps="2")
    found = serious(axe.run(page))
    page.locator(".job", has_text="seen by axe").get_by_text("Cancel").click()
    card(page, "axe waits").wait_for()
    open_card(page, "axe waits").locator("summary").click()
    found += serious(axe.run(page))
    press(page.locator("#viewer"), "Delete")
    found += serious(axe.run(page))
    assert found == []


def serious(results: Any) -> list[str]:
    """Return rule and element of each serious finding."""
    return [
        f"{rule['id']}: {node['html'][:120]} {node.get('failureSummary', '')[:200]}"
        for rule in results.response["violations"]
        if rule["impact"] in SERIOUS
        for node in rule["nodes"]
    ]
