"""Options that take one of several modes: `off`, `fixed:15`, `adaptive:patience=5,minimum=0.6`.

A mode is a name, perhaps with numbers after a colon: first those that have to be given, bare, then
any of those with a default, by name, separated by commas; texts, such as paths, likewise by name.
A mode without a name is its numbers. At the end: the modes of each acceleration.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: More denoising steps than this are likelier a typing error than a wish.
MAX_STEPS = 1000


@dataclass(frozen=True)
class Number:
    """A number that a mode takes, from low to high. default: None means it has to be given."""

    low: float
    high: float
    default: float | None = None
    whole: bool = False


@dataclass(frozen=True)
class Mode:
    """One mode and its numbers, those without a default first. texts: empty unless given."""

    name: str
    numbers: Mapping[str, Number] = field(default_factory=dict)
    texts: tuple[str, ...] = ()

    @property
    def form(self) -> str:
        """How to write it, such as fixed:STEPS or adaptive[:patience=3,tolerance=0.0001]."""
        bare = [name.upper() for name, number in self.numbers.items() if number.default is None]
        named = [
            f"{name}={_text(number.default)}"
            for name, number in self.numbers.items()
            if number.default is not None
        ] + [f"{name}={name.upper()}" for name in self.texts]
        text = _joined(self.name, bare)
        if not named:
            return text
        return f"{text}[{',' if bare else ':'}{','.join(named)}]"


@dataclass(frozen=True)
class ParsedMode:
    """A mode as it was asked for: every number and text has its value."""

    name: str
    values: Mapping[str, float]
    text: str
    texts: Mapping[str, str] = field(default_factory=dict)


class Modes:
    """The modes of one option. Called with text (or a bare number), gives the full spelling."""

    def __init__(self, *modes: Mode) -> None:
        self._modes = {mode.name: mode for mode in modes}

    @property
    def forms(self) -> str:
        """All ways to write a value, for messages."""
        *first, last = [mode.form for mode in self._modes.values()]
        return f"{', '.join(first)} or {last}" if first else last

    def __call__(self, value: Any) -> str:
        """The value with every number spelt out; raises ValueError that names what is expected."""
        return self.parse(value).text

    def parse(self, value: Any) -> ParsedMode:
        """The mode that a value means; raises ValueError as a call does."""
        if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
            raise ValueError(self.forms)
        text = str(value).strip()
        name, colon, rest = text.partition(":")
        name = name.lower()
        if not name or name not in self._modes:
            name, colon, rest = "", ":", text
        if name not in self._modes:
            raise ValueError(self.forms)
        mode = self._modes[name]
        try:
            texts, others = _read_texts(mode, rest.split(",") if colon else [])
            values = _read_numbers(mode, others)
        except ValueError as error:
            raise ValueError(f"{mode.form if name else self.forms}{error}") from None
        spelt = _spelt(mode, values) + [f"{key}={text}" for key, text in texts.items() if text]
        return ParsedMode(name, values, _joined(name, spelt), texts)


def _read_texts(mode: Mode, given: list[str]) -> tuple[dict[str, str], list[str]]:
    """Every text of `mode`, empty where none is given, and what else is given."""
    texts, rest = dict.fromkeys(mode.texts, ""), []
    for item in given:
        key, _, text = (part.strip() for part in item.partition("="))
        if key.lower() not in texts:
            rest.append(item)
        elif not text or texts[key.lower()]:
            raise ValueError("")
        else:
            texts[key.lower()] = text
    return texts, rest


def _read_numbers(mode: Mode, given: list[str]) -> dict[str, float]:
    """Every number of `mode`: as given, or its default. Raises ValueError with what more to say."""
    values: dict[str, float] = {}
    bare = [name for name, number in mode.numbers.items() if number.default is None]
    for item in given:
        key, named, text = item.partition("=")
        if not named:
            key, text = (bare[0] if bare else ""), item
        key = key.strip().lower()
        if key not in mode.numbers or key in values:
            raise ValueError("")
        if key in bare:
            bare.remove(key)
        values[key] = _read_number(mode.numbers[key], key, text)
    if bare:
        raise ValueError("")
    defaults = {name: number.default for name, number in mode.numbers.items()}
    filled = {name: values.get(name, default) for name, default in defaults.items()}
    return {name: value for name, value in filled.items() if value is not None}


def _read_number(number: Number, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not number.low <= value <= number.high or (number.whole and value != int(value)):
        kind = "a whole number" if number.whole else "a number"
        label = name if number.default is not None else name.upper()
        bounds = f"{_text(number.low)} to {_text(number.high)}"
        raise ValueError(f", with {kind} from {bounds} as {label}")
    return value


def _spelt(mode: Mode, values: Mapping[str, float]) -> list[str]:
    """The numbers as they are written, bare ones first."""
    return [
        _text(values[name]) if number.default is None else f"{name}={_text(values[name])}"
        for name, number in mode.numbers.items()
    ]


def _joined(name: str, numbers: list[str]) -> str:
    return (":" if name and numbers else "").join([name, ",".join(numbers)])


def _text(value: float) -> str:
    """The shortest text that reads back as this number."""
    return str(int(value)) if value == int(value) else repr(value)


#: When to leap to the end: after so many steps, at a flow time, once the velocity holds its
#: direction, or by the rule in On-device Sora's code.
LPL = Modes(
    Mode("off"),
    Mode("fixed", {"steps": Number(0, MAX_STEPS, whole=True)}),
    Mode("t", {"time": Number(0, 1000)}),
    Mode(
        "adaptive",
        {
            "patience": Number(1, MAX_STEPS, 3, whole=True),
            "tolerance": Number(0, 2, 1e-4),
            "minimum": Number(0, 1, 0.5),
        },
    ),
    Mode("reference"),
)
#: In how many of the first steps frames are merged.
TDTM = Modes(Mode("off"), Mode("all"), Mode("", {"steps": Number(1, MAX_STEPS, whole=True)}))

#: Tokens' sum of all blocks as it was (0), or on the line through the last two (1).
_ORDER = Number(0, 1, 0, whole=True)

#: In which steps the blocks run: the first few and then every EACH-th; those that were searched
#: for this model; or once the tokens have moved far enough.
STEP_CACHE = Modes(
    Mode("off"),
    Mode(
        "every",
        {
            "each": Number(1, MAX_STEPS, whole=True),
            "warmup": Number(1, MAX_STEPS, 6, whole=True),
            "order": _ORDER,
        },
    ),
    Mode("table", {"computed": Number(1, MAX_STEPS, whole=True), "order": _ORDER}, ("file",)),
    Mode(
        "online",
        {
            "threshold": Number(0, 100, 0.15),
            "warmup": Number(1, MAX_STEPS, 5, whole=True),
            "order": _ORDER,
        },
    ),
)
#: From which part of the run on guidance is whole in every EACH-th step only.
GUIDANCE_CACHE = Modes(
    Mode("off"),
    Mode(
        "every",
        {
            "each": Number(1, MAX_STEPS, whole=True),
            "after": Number(0, 1, 0.333),
            "boost": Number(0, 10, 1),
        },
    ),
)
#: Flow times between which there is guidance.
GUIDANCE_INTERVAL = Modes(Mode("off"), Mode("", {"low": Number(0, 1000), "high": Number(0, 1000)}))
