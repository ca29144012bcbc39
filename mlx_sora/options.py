"""How a value of an option is read, from the command line, a keyword or a recorded request."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def as_bool(value: Any) -> bool:
    """A bool and nothing that merely behaves like one."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def as_int(value: Any) -> int:
    """An integer, also when written as text. Booleans are refused."""
    if isinstance(value, str):
        if not re.fullmatch(r"[+-]?[0-9]{1,30}", value.strip()):
            raise ValueError("a whole number")
        return int(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError("a whole number")
    return int(value)


def as_float(value: Any) -> float:
    """A finite number, also when written as text. Booleans are refused."""
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        raise ValueError("a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError("a number") from None
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def as_text(value: Any) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError("text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("text that is valid UTF-8") from None
    return value


def as_path(value: Any) -> str:
    """A path, kept as text so that a trailing slash and templates survive."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    text = as_text(value)
    if not text or "\0" in text:
        raise ValueError("a path")
    return text


def as_frames(value: Any) -> int | str:
    """A number of frames, or a length such as "2s" that `mlx_sora.geometry` resolves."""
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        return value.strip()
    return as_int(value)


@dataclass(frozen=True)
class Option:
    """How one field is offered to the user.

    flags: names on the command line, the primary one first; empty means Python only.
    parse: text or value to the field's type; raises ValueError that names what is expected.
    choices: the valid values, when they can be listed.
    replay: whether `--config-from-metadata` takes it over from a recorded request.
    group: heading in the help.
    """

    help: str
    flags: tuple[str, ...]
    parse: Callable[[Any], Any]
    choices: tuple[str, ...] = ()
    metavar: str = ""
    replay: bool = True
    group: str = "generation"
