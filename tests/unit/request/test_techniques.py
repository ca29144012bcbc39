"""Configs of techniques: parsing, spelling, keywords, and messages about wrong values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest

import mlx_sora
from mlx_sora import GenerationRequest, GuidanceCache, GuidanceInterval, Lpl, StepCache, Tdtm
from mlx_sora.errors import UsageError
from mlx_sora.request.techniques import OFF, TechniqueConfig, integer, real, text


@dataclass(frozen=True, eq=False)
class MadeUp(TechniqueConfig):
    """Modes with values of every kind."""

    MODES = (OFF, "at", "auto", "")

    place: float = real({"at": None}, 0, 10)
    width: int = integer({"at": 2}, 1, 5)
    patience: int = integer({"auto": 3}, 1, 9)
    limit: float = real({"auto": 1e-4}, 0, 1)
    count: int = integer({"": None}, 1, 100)


@dataclass(frozen=True, eq=False)
class Table(TechniqueConfig):
    """One mode with a text."""

    MODES = ("table",)

    count: float = real({"table": None}, 1, 9)
    order: float = real({"table": 0}, 0, 1)
    file: str = text({"table": ""})


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
def test_text_is_parsed_and_spelt_out(
    given: object, text: str, name: str, values: dict[str, float]
) -> None:
    config = MadeUp.parse(given)
    assert (str(config), config.mode) == (text, name)
    assert {key: getattr(config, key) for key in values} == values
    assert MadeUp.parse(text) == config == MadeUp(name, **values)  # type: ignore[arg-type]


def test_text_values_keep_their_case_and_default_to_empty() -> None:
    assert Table.forms() == "table:COUNT[,order=0,file=FILE]"
    plain, named = Table.parse("Table:3"), Table.parse("table:3,FILE=/A b/C:d.json,Order=1")
    assert (str(plain), plain.file) == ("table:3,order=0", "")
    assert named.file == "/A b/C:d.json"
    assert str(named) == "table:3,order=1,file=/A b/C:d.json"
    assert Table.parse(str(named)) == named
    for wrong in ("table:3,file=", "table:3,file=a,file=b", "table:file=a"):
        with pytest.raises(ValueError, match=r"^table:COUNT"):
            Table.parse(wrong)


def test_forms_list_all_modes() -> None:
    assert MadeUp.forms() == "off, at:PLACE[,width=2], auto[:patience=3,limit=0.0001] or COUNT"


@pytest.mark.parametrize(
    ("given", "message"),
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
def test_wrong_text_raises_the_valid_forms(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        MadeUp.parse(given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bare_number_needs_a_mode_without_a_name() -> None:
    with pytest.raises(ValueError, match=r"^table:COUNT"):
        Table.parse("3")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (Lpl(after=15), "fixed:15"),
        (Lpl(after=15, order=0), "fixed:15"),
        (Lpl(after=15, order=1), "fixed:15,order=1"),
        (Lpl(time=660), "t:660"),
        (Lpl(), "adaptive:patience=3,tolerance=0.0001,minimum=0.5"),
        (Lpl(patience=5), "adaptive:patience=5,tolerance=0.0001,minimum=0.5"),
        (Lpl("reference"), "reference"),
        (Lpl(OFF), "off"),
        (Tdtm(), "all"),
        (Tdtm(steps=3), "3"),
        (StepCache(each=4), "every:4,warmup=6,order=0"),
        (StepCache(computed=8, file="a.json"), "table:8,order=0,file=a.json"),
        (StepCache(warmup=2), "online:threshold=0.15,warmup=2,order=0"),
        (GuidanceInterval(low=100, high=900.5), "100,900.5"),
        (GuidanceCache(each=5, boost=1.2), "every:5,after=0.333,boost=1.2"),
    ],
    ids=str,
)
def test_keywords_equal_text(config: TechniqueConfig, text: str) -> None:
    assert str(config) == text
    assert config == text == type(config).parse(text)
    assert hash(config) == hash(text)
    assert config not in ("fixed:1", None, 15, MadeUp(OFF))


def test_request_accepts_configs() -> None:
    configs = {"lpl": Lpl(after=15), "tdtm": Tdtm(steps=3), "step_cache": StepCache(each=4)}
    request = GenerationRequest("a", **configs)  # type: ignore[arg-type]
    assert request.lpl is configs["lpl"]
    assert request == GenerationRequest("a", lpl="fixed:15", tdtm=3, step_cache="every:4")
    assert request.to_dict() == {
        "prompt": "a",
        "lpl": "fixed:15",
        "tdtm": "3",
        "step_cache": "every:4,warmup=6,order=0",
    }
    with pytest.raises(UsageError, match="^lpl must be off, fixed:STEPS"):
        GenerationRequest("a", lpl=Tdtm())  # type: ignore[arg-type]


def test_configs_are_public_names() -> None:
    assert {"Lpl", "Tdtm", "StepCache", "GuidanceInterval", "GuidanceCache"} <= {*dir(mlx_sora)}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"place": 11}, r"MadeUp: place must be a number from 0 to 10, not 11\. As text: off, at"),
        ({"place": True}, "place must be a number"),
        ({"place": "near"}, "not 'near'"),
        ({"width": 1.5, "place": 1}, "width must be a whole number from 1 to 5"),
        ({"width": 2}, "MadeUp has no mode with width"),
        ({"place": 1, "count": 2}, "MadeUp has no mode with place, count"),
        ({"mode": "at"}, "MadeUp has no mode 'at' with no values"),
        ({"mode": "there", "place": 1}, "has no mode 'there' with place"),
        ({"mode": OFF, "place": 1}, "has no mode 'off' with place"),
    ],
)
def test_wrong_keywords_raise_the_valid_forms(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MadeUp(**keywords)  # type: ignore[arg-type]


def test_replace_changes_one_value() -> None:
    assert replace(Lpl(after=15), after=3) == Lpl(after=3)
