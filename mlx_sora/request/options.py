"""How a value of an option is read, from the command line, a keyword or a recorded request."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlx_sora.errors import UsageError
from mlx_sora.geometry import MAX_TILES, MICRO_FRAME_SIZE
from mlx_sora.request.modes import Modes

#: Bytes of a file's name and of a path that file systems take.
MAX_NAME, MAX_PATH = 255, 4000


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


def as_bits(value: Any) -> int:
    """Bits of a quantised weight."""
    bits = as_int(value)
    if bits not in (4, 8):
        raise ValueError("4 or 8")
    return bits


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
    longest = max((len(name.encode()) for name in text.split("/")), default=0)
    if not text or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text):
        raise ValueError("a path without control characters")
    if longest > MAX_NAME or len(text.encode()) > MAX_PATH:
        raise ValueError(f"a path whose names have up to {MAX_NAME} bytes")
    return text


def as_frames(value: Any) -> int | str:
    """A number of frames, or a length such as "2s" that `mlx_sora.geometry` resolves."""
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        return value.strip()
    return as_int(value)


class ImageReference(NamedTuple):
    """A picture that frame `frame` shows (negative: from the end).

    strength: 1 keeps it as it is; below, it is denoised anew from that much of it.
    """

    path: str
    frame: int = 0
    strength: float = 1.0


class VideoReference(NamedTuple):
    """A video before or after the one to be made, which takes over `frames` of its frames.

    frames: the last of a video before, the first of one after. strength: as in Picture.
    """

    path: str
    side: str = "before"
    frames: int = MICRO_FRAME_SIZE
    strength: float = 1.0


def as_images(value: Any) -> tuple[ImageReference, ...]:
    """Pictures, each a path or (path, frame, strength); a frame may also be "first" or "last"."""
    expected = "paths, each perhaps with a frame (a number, first or last) and a strength (0 to 1)"

    def read(path: Any, frame: Any = 0, strength: Any = 1.0) -> ImageReference:
        named = {"first": 0, "last": -1}.get(frame) if isinstance(frame, str) else None
        number = as_int(frame) if named is None else named
        return ImageReference(as_path(path), number, _as_strength(strength))

    return _each(value, read, expected)


def as_videos(value: Any) -> tuple[VideoReference, ...]:
    """Videos, each a path or (path, before or after, frames, strength)."""
    expected = "paths, each perhaps with before or after, frames to use and a strength (0 to 1)"

    def read(
        path: Any, side: Any = "before", frames: Any = MICRO_FRAME_SIZE, strength: Any = 1.0
    ) -> VideoReference:
        count = as_int(frames)
        if side not in ("before", "after") or count < 1:
            raise ValueError
        return VideoReference(as_path(path), side, count, _as_strength(strength))

    return _each(value, read, expected)


def as_paths(value: Any) -> tuple[str, ...]:
    """Paths in a list, or joined by semicolons as Open-Sora writes them."""
    if isinstance(value, str):
        value = value.split(";") if value else ()
    return _each(value, as_path, "paths, in a list or joined by ;")


def _as_strength(value: Any) -> float:
    strength = as_float(value)
    if not 0 < strength <= 1:
        raise ValueError
    return strength


def _each(value: Any, read: Callable[..., Any], expected: str) -> tuple[Any, ...]:
    """`read` of every item of a list; an item is a path, or a list that begins with one."""
    items = [value] if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(items, Iterable):
        raise ValueError(expected)
    try:
        return tuple(
            read(item) if isinstance(item, (str, os.PathLike)) else read(*item) for item in items
        )
    except (ValueError, TypeError):
        raise ValueError(expected) from None


def _shown(value: Any) -> str:
    """The beginning of a refused value; Python does not write integers of any length."""
    try:
        return repr(str(value)[:80])
    except (ValueError, RecursionError):
        return f"this {type(value).__name__}"


@dataclass(frozen=True)
class Option:
    """How one field is offered to the user.

    flags: names on the command line, the primary one first; empty means Python only.
    parse: text or value to the field's type; raises ValueError that names what is expected.
    choices: the valid values, when they can be listed.
    replay: whether `--config-from-metadata` takes it over from a recorded request.
    group: heading in the help. many: the flag can be repeated, each time with several words.
    """

    help: str
    flags: tuple[str, ...]
    parse: Callable[[Any], Any]
    choices: tuple[str, ...] = ()
    metavar: str = ""
    replay: bool = True
    group: str = "generation"
    many: bool = False

    def convert(self, value: Any, label: str) -> Any:
        """A value as the field's type. Raises UsageError, which calls the option `label`."""
        try:
            parsed = self.parse(value)
        except ValueError as error:
            raise UsageError(f"{label} must be {error}, not {_shown(value)}.") from None
        if self.choices and parsed not in self.choices:
            valid = ", ".join(self.choices)
            raise UsageError(f"unknown {label} {_shown(parsed)}.", f"Valid: {valid}.")
        return parsed


def option(default: Any, parse: Callable[[Any], Any], flags: str, help: str, **more: Any) -> Any:
    """A dataclass field that carries its `Option`; `flags` are separated by blanks."""
    made = Option(help=help, flags=tuple(flags.split()), parse=parse, **more)
    return field(default=default, metadata={"option": made})


def technique(modes: Modes, flag: str, help: str, metavar: str = "MODE") -> Any:
    """The field of an acceleration, whose modes are told in its help where {forms} stands."""
    text = help.format(forms=modes.forms)
    return option(None, modes, flag, text, metavar=metavar, group="acceleration")


def tiles() -> Any:
    """The field of tiled decoding."""

    def parse(value: Any) -> int:
        count = as_int(value)
        if not 1 <= count <= MAX_TILES:
            raise ValueError(f"1 to {MAX_TILES} tiles in a row")
        return count

    text = (
        f"decode pictures in N x N blended tiles, 2 to {MAX_TILES}: an approximation, for large "
        "pictures in little memory; 1 is off"
    )
    return option(None, parse, "--vae-tiles", text, metavar="N", group="memory")


#: How ranks divide a video, by the field's names; see mlx_sora/distributed/partition.py.
PARALLEL = ("auto", "guidance", "sequence", "both", "prompts", "off")


def parallel() -> Any:
    """The field of what several ranks do."""
    return option(
        "auto",
        as_text,
        "--parallel",
        "with mlx.launch, what ranks divide: the halves of guidance, the sequence of tokens, both, "
        "or whole prompts of --prompt-file; off leaves all to one rank",
        choices=PARALLEL,
        replay=False,
        group="memory",
    )
