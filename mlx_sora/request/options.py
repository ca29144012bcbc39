"""Option, the description of one field of a request, and the readers of its values.

A value comes from the command line, a keyword of the Python API or a recorded request. A reader
turns it into the type of the field, or raises ValueError with what is expected.
"""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from mlx_sora.errors import UsageError
from mlx_sora.geometry import MAX_TILES, MICRO_FRAME_SIZE, RESOLUTIONS
from mlx_sora.request.pixels import Pixels, is_footage, is_medium, read_medium

#: Bits per weight of quantized weights.
WIDTHS = (3, 4, 5, 6, 8)

#: Forms of small floats, with a scale per group; names as in `mx.quantize`.
FLOAT_FORMS = ("mxfp4", "nvfp4", "mxfp8")

#: Start of an average of bits per weight, which `calibrate --bits` helps to spend.
MIXED = "mixed:"

#: Names of the networks that are quantized, to their parts of a model.
NETWORKS = {"t5": "text_encoder", "transformer": "transformer"}

#: Bytes of a file's name and of a path that file systems take.
MAX_NAME, MAX_PATH = 255, 4000


def plain_number(value: Any) -> Any:
    """Return a 0-dimensional array or a scalar of numpy as Python's number, others as they are."""
    return value.item() if getattr(value, "shape", None) == () else value


def as_bool(value: Any) -> bool:
    """Return a bool. Numbers and texts are refused."""
    value = plain_number(value)
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def as_int(value: Any) -> int:
    """Return an integer, also from text and from whole numbers of other types. Refuses booleans."""
    value = plain_number(value)
    if isinstance(value, str):
        if not re.fullmatch(r"[+-]?[0-9]{1,300}", value.strip()):
            raise ValueError("a whole number")
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Decimal)):
        raise ValueError("a whole number")
    try:
        whole: Any = math.trunc(value)
    except (ValueError, OverflowError):  # not a number, or infinite
        raise ValueError("a whole number") from None
    if whole != value:
        raise ValueError("a whole number")
    return int(whole)


def as_float(value: Any) -> float:
    """Return a finite number, also from text. Booleans are refused."""
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real, Decimal)):
        raise ValueError("a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError("a number") from None
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def as_amount(value: Any) -> str:
    """Return an amount of memory as text; a number counts bytes."""
    return value if isinstance(value, str) else str(as_int(value))


def as_quantization(value: Any) -> int | str:
    """Return how to quantize the weights, in its usual spelling.

    Bits as a number, else text: a form, mixed:BITS (an average), or the form of each network.
    """
    text = as_text(value).replace(" ", "") if isinstance(value, str) else ""
    try:
        if text.startswith(MIXED):
            bits = as_float(text.removeprefix(MIXED))
            if not WIDTHS[0] <= bits <= WIDTHS[-1]:
                raise ValueError
            return f"{MIXED}{bits:g}"
        if "=" not in text:
            return _as_form(value)
        pairs = [part.split("=", 1) for part in text.split(",")]
        forms = {name: _as_form(form) for name, form in pairs}
        if not forms.keys() <= NETWORKS.keys() or len(forms) < len(pairs):
            raise ValueError
        return ",".join(f"{name}={forms[name]}" for name in NETWORKS if name in forms)
    except ValueError:
        names = ", ".join(map(str, (*WIDTHS, *FLOAT_FORMS)))
        raise ValueError(f"{names}, {MIXED}BITS or such as t5=4,transformer=8") from None


def _as_form(value: Any) -> int | str:
    if isinstance(value, str) and value.strip() in FLOAT_FORMS:
        return value.strip()
    bits = as_int(value)
    if bits not in WIDTHS:
        raise ValueError
    return bits


def forms_by_part(value: int | str) -> dict[str, int | str]:
    """Return the form of each quantized part of a model, of a value of `as_quantization`.

    The value is no average.
    """
    pairs = [part.split("=") for part in str(value).split(",")]
    forms = dict(pairs) if "=" in str(value) else dict.fromkeys(NETWORKS, str(value))
    return {NETWORKS[name]: _as_form(form) for name, form in forms.items()}


def as_dtype(value: Any) -> str:
    """Return the name of a data type, also from the short one that Open-Sora has."""
    text = as_text(value)
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    return short.get(text, text)


def as_tiles(value: Any) -> int:
    """Return the number of VAE tiles in a row."""
    count = as_int(value)
    if not 1 <= count <= MAX_TILES:
        raise ValueError(f"1 to {MAX_TILES} tiles in a row")
    return count


def as_size(value: Any) -> str:
    """Return a resolution, or a size as WIDTHxHEIGHT."""
    text = as_text(value).strip().lower()
    if text not in RESOLUTIONS and not re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", text):
        raise ValueError(f"WIDTHxHEIGHT or one of {', '.join(RESOLUTIONS)}")
    return text


def as_text(value: Any) -> str:
    """Return a string that can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise ValueError("text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("text that is valid UTF-8") from None
    return value


def as_path(value: Any) -> str:
    """Return a path as text, so that a trailing slash and templates survive."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    text = as_text(value)
    longest = max((len(name.encode()) for name in text.split("/")), default=0)
    if not text:
        raise ValueError("a path")
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text):
        raise ValueError("a path without control characters")
    if longest > MAX_NAME or len(text.encode()) > MAX_PATH:
        raise ValueError(f"a path whose names have up to {MAX_NAME} bytes")
    return text


def as_file(value: Any) -> str:
    """Return the path of a file to read, with ~ expanded."""
    return os.path.expanduser(as_path(value))


def as_medium(value: Any) -> str:
    """Return the path of a picture or video to read, or the `Pixels` of one in memory."""
    medium = read_medium(value)
    return medium if isinstance(medium, Pixels) else as_file(medium)


def as_frames(value: Any) -> int | str:
    """Return a number of frames, or a length such as "2s" that `mlx_sora.geometry` resolves."""
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        return value.strip()
    return as_int(value)


class ImageReference(NamedTuple):
    """An image for frame `frame` (negative: from the end).

    strength: 1 keeps the image as it is; a smaller value lets denoising change it.
    """

    path: str
    frame: int = 0
    strength: float = 1.0


class VideoReference(NamedTuple):
    """A video that comes before or after the new one, which takes over `frames` of its frames.

    frames: the last ones of a video before, the first ones of a video after.
    strength: as in ImageReference.
    """

    path: str
    side: str = "before"
    frames: int = MICRO_FRAME_SIZE
    strength: float = 1.0


def as_images(value: Any) -> tuple[ImageReference, ...]:
    """Return images. Each is a picture or (picture, frame, strength); "first", "last" are frames.

    A picture is a path, a PIL image, pixels or a `Video` of one frame.
    """
    expected = "paths, each perhaps with a frame (a number, first or last) and a strength (0 to 1)"

    def read(path: Any, frame: Any = 0, strength: Any = 1.0) -> ImageReference:
        named = {"first": 0, "last": -1}.get(frame) if isinstance(frame, str) else None
        number = as_int(frame) if named is None else named
        return ImageReference(as_medium(path), number, _as_strength(strength))

    return _each(value, read, expected, is_medium)


def as_videos(value: Any) -> tuple[VideoReference, ...]:
    """Return videos. Each is a video or (video, before or after, frames, strength).

    A video is a path, a `Video`, pixels or a list of pictures.
    """
    expected = "paths, each perhaps with before or after, frames to use and a strength (0 to 1)"

    def read(
        path: Any, side: Any = "before", frames: Any = MICRO_FRAME_SIZE, strength: Any = 1.0
    ) -> VideoReference:
        count = as_int(frames)
        if side not in ("before", "after") or count < 1:
            raise ValueError
        return VideoReference(as_medium(path), side, count, _as_strength(strength))

    return _each(value, read, expected, lambda each: is_medium(each) or is_footage(each))


def as_paths(value: Any) -> tuple[str, ...]:
    """Return media from a list, or paths joined by semicolons as Open-Sora writes them."""
    if isinstance(value, str) and not isinstance(value, Pixels):
        value = value.split(";") if value else ()
    return _each(value, as_medium, "paths, in a list or joined by ;", is_medium)


def _as_strength(value: Any) -> float:
    strength = as_float(value)
    if not 0 < strength <= 1:
        raise ValueError
    return strength


def _each(
    value: Any, read: Callable[..., Any], expected: str, is_single: Callable[[Any], bool]
) -> tuple[Any, ...]:
    items = [value] if is_single(value) else value
    if not isinstance(items, Iterable):
        raise ValueError(expected)
    try:
        return tuple(read(item) if is_single(item) else read(*item) for item in items)
    except (ValueError, TypeError):
        raise ValueError(expected) from None


def _shown(value: Any) -> str:
    """Return the start of a refused value. Python refuses to print very long integers."""
    try:
        return repr(str(value)[:80])
    except (ValueError, RecursionError):
        return f"this {type(value).__name__}"


#: Reader of a field that names none, by its type.
_READERS = {"str": as_text, "int": as_int, "float": as_float, "bool": as_bool}


@dataclass(frozen=True)
class Option:
    """One field of a request: how its value is read and checked, and how commands offer it.

    parse: value or text to the type of the field; raises ValueError that names what is expected.
    tasks: commands that offer the option. common: shown by --help, the others by --help-all.
    choices: the valid values of a text. low, high: the range that `check_range` allows; fix: what
    to do outside of it.
    aliases: flags beside the one that follows from the name. python_only: there is no flag.
    many: the flag can be repeated, each time with several words. group: heading in the help.
    replay: part of what makes the video, so that a replay of the request takes it over.
    """

    name: str
    default: Any
    help: str
    parse: Callable[[Any], Any]
    tasks: tuple[str, ...]
    common: bool = False
    metavar: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    fix: str = ""
    aliases: tuple[str, ...] = ()
    python_only: bool = False
    many: bool = False
    group: str = "generation"
    replay: bool = True

    @classmethod
    def from_field(cls, field: Field[Any]) -> Option:
        """Return the option of a field that was made with `option`."""
        reader = _READERS.get(str(field.type).removesuffix(" | None"))
        inferred = {"parse": reader, "metavar": "N" if reader is as_int else ""}
        return cls(field.name, field.default, **(inferred | field.metadata["option"]))

    @property
    def required(self) -> bool:
        """True if the value is never None, which stands for the default of the model."""
        return self.default is not None

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags on the command line, the primary one first."""
        if self.python_only:
            return ()
        name = self.name.removesuffix("s") if self.many else self.name
        return ("--" + name.replace("_", "-"), *self.aliases)

    @property
    def typed_flags(self) -> tuple[str, ...]:
        """Flags as a user types them: `--no-...` if the option is on by default."""
        if self.default is not True:
            return self.flags
        return tuple("--no-" + flag.removeprefix("--") for flag in self.flags)

    @property
    def flag_help(self) -> str:
        """Help of `typed_flags`."""
        return f"do not {self.help}" if self.default is True else self.help

    @property
    def label(self) -> str:
        """Name in messages: the primary flag, or the keyword if there is none."""
        return self.flags[0] if self.flags else self.name

    def convert(self, value: Any) -> Any:
        """Return `value` as the type of the field. Raises UsageError."""
        if value is None:
            if self.required:
                raise UsageError(f"{self.name} is missing.", f"Give {self.label}.")
            return None
        try:
            parsed = self.parse(value)
        except ValueError as error:
            raise UsageError(f"{self.label} must be {error}, not {_shown(value)}.") from None
        if self.choices and parsed not in self.choices:
            valid = ", ".join(self.choices)
            raise UsageError(f"unknown {self.label} {_shown(parsed)}.", f"Valid: {valid}.")
        return parsed

    def check_range(self, value: Any) -> None:
        """Raise UsageError unless a converted value lies from `low` to `high`."""
        if value is None or self.low is None or self.high is None:
            return
        if not self.low <= value <= self.high:
            raise UsageError(
                f"{self.label} {str(value)[:40]} is out of range.",
                self.fix or f"Give {self.low} to {self.high}.",
            )


def option(
    help: str, default: Any = None, *, tasks: str = "generate bench", aliases: str = "", **more: Any
) -> Any:
    """Return a dataclass field with the description of its Option.

    Blanks separate `tasks` and `aliases`. What follows from the name and the type of the field
    needs no mention: the first flag, the reader of a simple type, the metavar of an integer.
    """
    described = {"help": help, "tasks": tuple(tasks.split()), "aliases": tuple(aliases.split())}
    return field(default=default, metadata={"option": described | more})
