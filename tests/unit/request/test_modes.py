"""Options with modes: what is read, how it is spelt out, and what a wrong value is told."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from mlx_sora.request.modes import Mode, Modes, Number

MODES = Modes(
    Mode("off"),
    Mode("at", {"place": Number(0, 10), "width": Number(1, 5, 2, whole=True)}),
    Mode("auto", {"patience": Number(1, 9, 3, whole=True), "limit": Number(0, 1, 1e-4)}),
    Mode("", {"count": Number(1, 100, whole=True)}),
)


@pytest.mark.parametrize(
    ("given", "text", "name", "values"),
    [
        ("off", "off", "off", {}),
        (" OFF ", "off", "off", {}),
        ("at:2.50", "at:2.5,width=2", "at", {"place": 2.5, "width": 2}),
        ("at:2,width=3", "at:2,width=3", "at", {"place": 2, "width": 3}),
        ("at:width=3, 2", "at:2,width=3", "at", {"place": 2, "width": 3}),
        ("at:place=2", "at:2,width=2", "at", {"place": 2, "width": 2}),
        ("auto", "auto:patience=3,limit=0.0001", "auto", {"patience": 3, "limit": 1e-4}),
        ("auto:limit=1e-7", "auto:patience=3,limit=1e-07", "auto", {"patience": 3, "limit": 1e-7}),
        ("17", "17", "", {"count": 17}),
        (17, "17", "", {"count": 17}),
        (np.int64(17), "17", "", {"count": 17}),
        (17.0, "17", "", {"count": 17}),
    ],
)
def test_reading(given: object, text: str, name: str, values: dict[str, float]) -> None:
    chosen = MODES.parse(given)
    assert (chosen.text, chosen.name, chosen.values) == (text, name, values)
    assert MODES.parse(text) == chosen
    assert MODES(given) == text


def test_texts_keep_their_case_and_are_empty_unless_given() -> None:
    modes = Modes(Mode("table", {"count": Number(1, 9), "order": Number(0, 1, 0)}, ("file",)))
    assert modes.forms == "table:COUNT[,order=0,file=FILE]"
    plain, named = modes.parse("Table:3"), modes.parse("table:3,FILE=/A b/C:d.json,Order=1")
    assert (plain.text, plain.texts) == ("table:3,order=0", {"file": ""})
    assert named.texts == {"file": "/A b/C:d.json"}
    assert named.text == "table:3,order=1,file=/A b/C:d.json"
    assert modes.parse(named.text) == named
    for wrong in ("table:3,file=", "table:3,file=a,file=b", "table:file=a"):
        with pytest.raises(ValueError, match=r"^table:COUNT"):
            modes(wrong)


def test_forms_say_all_there_is() -> None:
    assert MODES.forms == "off, at:PLACE[,width=2], auto[:patience=3,limit=0.0001] or COUNT"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (True, "off, at:PLACE"),
        (None, "off, at:PLACE"),
        ("", "with a whole number from 1 to 100 as COUNT"),
        ("of", "off, at:PLACE"),
        (0, "off, at:PLACE"),
        (101, "from 1 to 100 as COUNT"),
        (Fraction(3, 2), "COUNT"),
        (":5", "COUNT"),
        ("off:1", "off"),
        ("at", "at:PLACE[,width=2]"),
        ("at:", "a number from 0 to 10 as PLACE"),
        ("at:11", "a number from 0 to 10 as PLACE"),
        ("at:nan", "a number from 0 to 10 as PLACE"),
        ("at:inf", "a number from 0 to 10 as PLACE"),
        ("at:1,2", "at:PLACE"),
        ("at:1,width=2,width=2", "at:PLACE"),
        ("at:1,width=1.5", "a whole number from 1 to 5 as width"),
        ("at:1,widht=2", "at:PLACE[,width=2]"),
        ("auto:3", "auto[:patience=3"),
        ("auto:", "auto[:patience=3"),
        ("auto:patience", "auto[:patience=3"),
        ("auto:limit=1e400", "from 0 to 1 as limit"),
    ],
)
def test_wrong_values_are_told_the_valid_ones(given: object, told: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        MODES(given)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_nameless_mode_a_bare_number_is_nothing() -> None:
    with pytest.raises(ValueError, match="^on or off$"):
        Modes(Mode("on"), Mode("off"))("3")
