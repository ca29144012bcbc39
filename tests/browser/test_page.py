"""The page with the bundled model: make, watch, change, cancel, in a real browser."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.browser.actions import (
    call,
    card,
    delete,
    open_card,
    press,
    row,
    set_option,
    submit,
    wait_until_done,
)
from tests.helpers.server_process import ServerProcess

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import expect

RED = "a red circle moving right on a black background"
BLUE = "a blue circle moving right on a black background"

#: Resolves when a video plays. Playwright's own waiting evaluates text, which the page refuses.
PLAYS = """film => new Promise((resolve) => {
    const look = () => (film.currentTime > 0 ? resolve() : setTimeout(look, 50));
    look();
})"""


@pytest.fixture(scope="module")
def red(server: ServerProcess) -> str:
    """The identifier of a finished video."""
    request = {"prompt": RED, "seed": 3, "steps": 4}
    id = str(call(server, "POST", "/v1/videos", request)["id"])
    wait_until_done(server, id)
    return id


def occupy(server: ServerProcess) -> None:
    """Start a video that takes long, and runs before all that follow."""
    request = {"prompt": "a long one", "steps": 1000, "preview_every": 10}
    call(server, "POST", "/v1/videos", request)


def test_a_prompt_is_offered_made_and_watched(page: Page) -> None:
    expect(page.locator("#plan")).to_contain_text("Fits in memory")
    expect(page.locator("#plan")).not_to_contain_text("not trained")
    page.locator("#examples button").nth(1).click()
    prompt = page.input_value("#prompt")
    expect(page.locator("#plan")).to_contain_text("Fits in memory")
    submit(page, prompt, steps="6")
    expect(row(page, prompt)).to_be_visible()
    viewer = open_card(page, prompt)
    film = viewer.locator("video")
    film.evaluate(PLAYS)
    assert film.evaluate("film => [film.videoWidth, film.videoHeight]") == [64, 64]
    viewer.locator("summary").click()
    expect(viewer.locator("pre")).to_contain_text('"steps": 6')
    with page.expect_download() as download:
        viewer.get_by_text("Download").click()
    assert download.value.suggested_filename.endswith("background.mp4")
    assert download.value.path().read_bytes()[4:8] == b"ftyp"
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()


def test_a_running_video_shows_progress_and_preview_through_a_reload(
    page: Page, server: ServerProcess
) -> None:
    occupy(server)
    running = row(page, "a long one")
    expect(running).to_contain_text(re.compile(r"step \d+ of 1000.* left"))
    expect(running.locator("img")).to_have_attribute("src", re.compile("variant=preview"))
    page.fill("#prompt", "words that are not sent yet")
    set_option(page, "steps", "7")
    page.reload()
    expect(running).to_contain_text(re.compile(r"step \d+ of 1000"))
    expect(page.locator("#prompt")).to_have_value("words that are not sent yet")
    expect(page.locator("#option-steps")).to_have_value("7")
    expect(page).to_have_title(re.compile(r"\d+% - mlx_sora"))


def test_a_cancelled_video_goes_on(page: Page, server: ServerProcess) -> None:
    submit(page, "a green square on a gray background", steps="600")
    running = row(page, "a green square")
    expect(running).to_contain_text(re.compile(r"step [1-9]\d* of 600"))
    press(running, "Cancel: a green square on a gray background")
    expect(card(page, "a green square")).to_contain_text("Cancelled")
    press(open_card(page, "a green square"), "Go on")
    expect(running).to_be_visible()
    running.get_by_text("Cancel").click()
    expect(card(page, "a green square")).to_contain_text("Cancelled")
    delete(page, "a green square")
    assert call(server, "GET", "/v1/videos?state=cancelled")["data"] == []


def test_the_queue_is_ordered_by_keyboard_and_mouse(page: Page, server: ServerProcess) -> None:
    occupy(server)
    for name in ("one", "two", "three"):
        submit(page, f"number {name}")
    waiting = page.locator(".job:not(.running) .prompt")
    expect(waiting).to_have_text(["number one", "number two", "number three"])
    up = page.get_by_label("Move up: number three")
    up.focus()
    page.keyboard.press("Enter")
    expect(waiting).to_have_text(["number one", "number three", "number two"])
    expect(up).to_be_focused()
    row(page, "number two").drag_to(row(page, "number one"))
    expect(waiting).to_have_text(["number two", "number one", "number three"])


@pytest.mark.usefixtures("red")
def test_a_video_is_edited_by_a_prompt(page: Page) -> None:
    press(open_card(page, RED), "Edit by prompt")
    expect(page.locator("#form-title")).to_have_text("Edit by prompt")
    expect(page.locator("#source-prompt")).to_have_value(RED)
    submit(page, BLUE, steps="2")
    viewer = open_card(page, BLUE)
    expect(viewer).to_contain_text("An edit of")
    press(viewer, "that video")
    expect(viewer.locator("h2")).to_have_text(RED)


@pytest.mark.usefixtures("red")
def test_a_video_is_gone_on_from(page: Page) -> None:
    press(open_card(page, RED), "Go on from here")
    expect(page.locator("#media-list li")).to_contain_text("Go on from its end")
    expect(page.locator("#length")).to_have_value("34")
    submit(page, f"{RED} again", steps="2")
    viewer = open_card(page, f"{RED} again")
    expect(viewer).to_contain_text("Goes on from")
    expect(viewer).to_contain_text("34 frames")


def test_a_video_is_made_again_and_changed(page: Page, server: ServerProcess, red: str) -> None:
    viewer = open_card(page, RED)
    press(viewer, "Same again")
    press(viewer, "Another one")
    page.keyboard.press("Escape")
    expect(card(page, RED)).to_have_count(3)
    made = call(server, "GET", "/v1/videos?order=asc")["data"]
    same, other = [v for v in made if v["mlx_sora"]["parent"] == red]
    assert same["mlx_sora"]["seed"] == 3
    assert other["mlx_sora"]["seed"] != 3
    press(open_card(page, RED), "Change this")
    expect(page.locator("#prompt")).to_have_value(RED)
    expect(page.locator("#option-steps")).to_have_value("4")
    press(page.locator("#form"), "Clear")


def test_two_tabs_show_the_same(page: Page, server: ServerProcess) -> None:
    second = page.context.new_page()
    second.goto(server.link)
    submit(page, "seen in both", steps="2")
    expect(card(second, "seen in both")).to_be_visible()
    delete(second, "seen in both")
    expect(card(page, "seen in both")).to_have_count(0)


def test_what_does_not_fit_is_said_before_and_refused(page: Page) -> None:
    page.fill("#prompt", RED)
    set_option(page, "memory_budget", "10MB")
    expect(page.locator("#plan")).to_contain_text("Does not fit in memory")
    page.click("#submit")
    expect(page.locator("#form-error")).to_contain_text("MB")
    expect(page.locator(".job")).to_have_count(0)
    set_option(page, "memory_budget", "")
    expect(page.locator("#plan")).to_contain_text("Fits in memory")
    set_option(page, "steps", "many")
    expect(page.locator("#plan")).to_contain_text("steps")


def test_a_size_that_would_fit_is_offered(page: Page) -> None:
    page.select_option("#size", "other")
    page.fill("#width", "8192")
    page.fill("#height", "8192")
    expect(page.locator("#plan")).to_contain_text("These would fit:")
    page.locator("#plan button").first.click()
    expect(page.locator("#plan")).to_contain_text("Fits in memory")
    assert page.input_value("#width") != "8192"


def test_foreign_text_stays_text(page: Page) -> None:
    prompt = "<img src=x onerror=alert(1)> <b>bold</b>"
    submit(page, prompt, steps="2")
    expect(card(page, prompt)).to_be_visible()
    expect(open_card(page, prompt).locator("h2")).to_have_text(prompt)
    assert page.locator("#viewer b").count() == 0
