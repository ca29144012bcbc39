"""Plots of the documentation show the data beside them, and its pictures come from its commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common import RESULTS
from benchmarks.pictures import PICTURES, description, recorded, shown
from benchmarks.plots import PLOTS, drawn_fingerprint, fingerprint


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_shows_its_data(name: str) -> None:
    drawn = drawn_fingerprint(RESULTS / f"{name}.png")
    assert drawn == fingerprint(name), "run: python -m benchmarks.plots"


def test_every_plot_is_drawn_by_the_command() -> None:
    assert {path.stem for path in RESULTS.glob("*.png")} == {*PLOTS}


def test_a_change_of_the_data_shows(tmp_path: Path) -> None:
    data = json.loads((RESULTS / "samplers.json").read_text("utf-8"))
    data["rows"][0]["psnr"] += 0.1
    (tmp_path / "samplers.json").write_text(json.dumps(data))
    assert fingerprint("samplers", tmp_path) != fingerprint("samplers")


def test_pictures_are_made_by_the_commands_of_the_readme() -> None:
    for picture, command in shown():
        assert recorded(picture) == description(command), "run: python -m benchmarks.pictures"
        assert picture.stat().st_size < 150_000


def test_every_picture_is_shown() -> None:
    assert {*PICTURES.iterdir()} == {picture for picture, _ in shown()}
