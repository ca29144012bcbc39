"""Configs of the accelerations, in Python and as text: `Lpl(after=15)` is `fixed:15`.

Text is the name of a mode, a colon, and values separated by commas: first those without a default,
then any others as name=value. A mode without a name is written as its values alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from mlx_sora.errors import UsageError
from mlx_sora.request.options import as_float

#: More denoising steps than this are likelier a typing error than a wish.
MAX_STEPS = 1000

#: Mode of every technique that switches it off.
OFF = "off"

Config = TypeVar("Config", bound="TechniqueConfig")


@dataclass(frozen=True)
class TechniqueParameter:
    """Value of a technique.

    defaults: mode to default value, for the modes that have the parameter; None: it is required.
    low, high: limits of a number. text: any text, such as a path, is valid instead.
    spelling: name of the parameter in text, if it is not that of the field.
    implied: a default that text leaves out.
    """

    defaults: Mapping[str, float | str | None]
    low: float = 0
    high: float = 0
    whole: bool = False
    text: bool = False
    spelling: str = ""
    implied: float | None = None

    def convert(self, value: Any) -> float | str:
        """Return the value in its type; raise ValueError that names what is expected."""
        if self.text:
            text = str(value).strip()
            if not text:
                raise ValueError("text")
            return text
        try:
            number = as_float(value)
        except ValueError:
            number = math.nan
        if not self.low <= number <= self.high or (self.whole and number != int(number)):
            kind = "a whole number" if self.whole else "a number"
            raise ValueError(f"{kind} from {_spell(self.low)} to {_spell(self.high)}")
        return int(number) if self.whole else number


@dataclass(frozen=True, eq=False)
class TechniqueConfig:
    """One technique with all its values.

    MODES: names of its modes. ACCELERATION: module and name of what makes the Acceleration from a
    config and a ScheduleInfo; as text, so that a config does not load MLX.
    mode: one of MODES; without it, the first mode that takes these values. After
    construction every value of the mode is set, and the values of other modes are None.
    Raises UsageError for values out of range or of different modes. A config equals its text.
    """

    MODES: ClassVar[tuple[str, ...]]
    ACCELERATION: ClassVar[str]

    mode: str | None = None

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "mode"}
        values = {name: value for name, value in values.items() if value is not None}
        title, hint = type(self).__name__, f"As text: {self.forms()}."
        modes = [m for m in self.MODES if m != OFF] if self.mode is None else [self.mode]
        mode = next((mode for mode in modes if self._fits(mode, values)), None)
        if mode is None:
            name = "mode" if self.mode is None else f"mode {self.mode!r}"
            found = ", ".join(values) or "no values"
            raise UsageError(f"{title} has no {name} with {found}.", hint)
        object.__setattr__(self, "mode", mode)
        for name, parameter in self._parameters(mode).items():
            value = values.get(name, parameter.defaults[mode])
            try:
                value = value if value == "" else parameter.convert(value)
            except ValueError as error:
                shown = repr(value)[:80]
                raise UsageError(f"{title}: {name} must be {error}, not {shown}.", hint) from None
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        """Return the config as text, with every number."""
        assert self.mode is not None
        items = []
        for name, parameter in self._parameters(self.mode).items():
            value, spelling = getattr(self, name), parameter.spelling or name
            required = parameter.defaults[self.mode] is None
            if value not in ("", parameter.implied):
                items.append(_spell(value) if required else f"{spelling}={_spell(value)}")
        return _join(self.mode, items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str | type(self)) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def parse(cls: type[Config], value: Any) -> Config:
        """Return the config of a text or bare number; a config is returned as it is.

        Raises ValueError that names what is expected.
        """
        if isinstance(value, cls):
            return value
        text = value.strip() if isinstance(value, str) else _number_text(value)
        mode, colon, rest = text.partition(":")
        mode = mode.lower()
        if not mode or mode not in cls.MODES:
            mode, colon, rest = "", ":", text
        if mode not in cls.MODES:
            raise ValueError(cls.forms())
        try:
            return cls(mode, **cls._read(mode, rest.split(",") if colon else []))
        except ValueError as error:
            raise ValueError(f"{cls._form(mode) if mode else cls.forms()}{error}") from None

    @classmethod
    def forms(cls) -> str:
        """Return all ways to write a value, for help and messages."""
        *first, last = [cls._form(mode) for mode in cls.MODES]
        return f"{', '.join(first)} or {last}" if first else last

    @classmethod
    def _form(cls, mode: str) -> str:
        """Return how to write one mode, such as adaptive[:patience=3,tolerance=0.0001]."""
        required, optional = [], []
        for name, parameter in cls._parameters(mode).items():
            default, spelling = parameter.defaults[mode], parameter.spelling or name
            if default is None:
                required.append(spelling.upper())
            else:
                optional.append(f"{spelling}={_spell(default) or spelling.upper()}")
        text = _join(mode, required)
        return f"{text}[{',' if required else ':'}{','.join(optional)}]" if optional else text

    @classmethod
    def _parameters(cls, mode: str) -> dict[str, TechniqueParameter]:
        """Return the parameters of a mode by field."""
        found = {f.name: f.metadata["parameter"] for f in fields(cls) if f.metadata}
        return {name: parameter for name, parameter in found.items() if mode in parameter.defaults}

    @classmethod
    def _fits(cls, mode: str, values: Mapping[str, Any]) -> bool:
        """Return whether a mode has all these values and requires no others."""
        parameters = cls._parameters(mode)
        required = {name for name, p in parameters.items() if p.defaults[mode] is None}
        return mode in cls.MODES and required <= values.keys() <= parameters.keys()

    @classmethod
    def _read(cls, mode: str, items: list[str]) -> dict[str, float | str]:
        """Return values by field. Raises ValueError with what to add to the form of the mode."""
        parameters = cls._parameters(mode)
        names = {p.spelling or name: name for name, p in parameters.items()}
        required = [key for key, name in names.items() if parameters[name].defaults[mode] is None]
        values: dict[str, float | str] = {}
        for item in items:
            key, named, text = item.partition("=")
            if not named:
                key, text = (required[0] if required else ""), item
            key = key.strip().lower()
            if key not in names or names[key] in values:
                raise ValueError("")
            label = key.upper() if key in required else key
            if key in required:
                required.remove(key)
            try:
                values[names[key]] = parameters[names[key]].convert(text)
            except ValueError as error:
                raise ValueError(f", with {error} as {label}") from None
        if required:
            raise ValueError("")
        return values


def _number_text(value: Any) -> str:
    """Return a number as text, or text that is none."""
    try:
        return _spell(as_float(value))
    except ValueError:
        return ""


def _join(mode: str, items: list[str]) -> str:
    return (":" if mode and items else "").join([mode, ",".join(items)])


def _spell(value: float | str) -> str:
    """Return the shortest text that reads back as this value."""
    if isinstance(value, str):
        return value
    return str(int(value)) if value == int(value) else repr(value)


def real(defaults: Mapping[str, float | None], low: float, high: float) -> Any:
    """Return the field of a number from low to high. defaults: as in TechniqueParameter."""
    return _parameter(TechniqueParameter(defaults, low, high))


def integer(defaults: Mapping[str, float | None], low: int, high: int, spelling: str = "") -> Any:
    """Return the field of a whole number; defaults, spelling: as in TechniqueParameter."""
    return _parameter(TechniqueParameter(defaults, low, high, whole=True, spelling=spelling))


def text(defaults: Mapping[str, str | None]) -> Any:
    """Return the field of a text. defaults: as in TechniqueParameter."""
    return _parameter(TechniqueParameter(defaults, text=True))


def _parameter(parameter: TechniqueParameter) -> Any:
    return field(default=None, kw_only=True, metadata={"parameter": parameter})


@dataclass(frozen=True, eq=False)
class Lpl(TechniqueConfig):
    """Rule of the leap to t = 0.

    after: number of ordinary steps before the leap. time: flow time of the leap, 1000 to 0.
    patience, tolerance, minimum: leap once the similarity of successive velocities has failed
    `patience` times to exceed its best by `tolerance`, counted after the share `minimum` of the
    steps. Mode "reference": the rule in the code of On-device Sora.
    order: 0 leaps along the velocity, 1 along its extrapolation from the last two.
    """

    MODES = (OFF, "fixed", "t", "adaptive", "reference")
    ACCELERATION = "mlx_sora.accel.lpl:make_leap"

    after: int = integer({"fixed": None}, 0, MAX_STEPS, spelling="steps")
    time: float = real({"t": None}, 0, 1000)
    patience: int = integer({"adaptive": 3}, 1, MAX_STEPS)
    tolerance: float = real({"adaptive": 1e-4}, 0, 2)
    minimum: float = real({"adaptive": 0.5}, 0, 1)
    order: int = _parameter(
        TechniqueParameter({"fixed": 0, "t": 0, "adaptive": 0}, 0, 1, whole=True, implied=0)
    )


#: Parts of a block in which TDTM may merge frames (see `mlx_sora.models.hooks.TokenMerging`), and
#: those in which On-device Sora merges them.
SITES = ("spatial", "temporal", "spatial-kv", "temporal-kv", "cross", "mlp")
PAPER_SITES = ("spatial", "temporal", "cross")

_MERGING = ("all", "", "last", "between")


@dataclass(frozen=True, eq=False)
class Tdtm(TechniqueConfig):
    """Token merging in the first `steps` steps; in all, the last ones, by flow time or a table.

    low, high: flow times at which merged steps start. sites: parts of the blocks joined by +, at
    true positions in time; without them every attention merges, as in On-device Sora. blocks: only
    these, as FIRST-LAST from 0. speed: that of all steps together, for which calibrate has chosen
    sites, blocks and steps (or the table `file` lists them).
    """

    MODES = (OFF, *_MERGING, "table")
    ACCELERATION = "mlx_sora.accel.tdtm:MergedSteps"

    steps: int = integer({"": None, "last": None}, 1, MAX_STEPS)
    low: float = real({"between": None}, 0, 1000)
    high: float = real({"between": None}, 0, 1000)
    speed: float = real({"table": None}, 1, 2)
    sites: str = text(dict.fromkeys(_MERGING, ""))
    blocks: str = text(dict.fromkeys(_MERGING, ""))
    file: str = text({"table": ""})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "between" and self.low > self.high:
            raise UsageError(f"--tdtm {self} is empty.", "Give the lower time first.")
        try:
            self._check_sites()
        except ValueError as error:
            raise UsageError(f"Tdtm: {error}", f"As text: {self.forms()}.") from None

    def _check_sites(self) -> None:
        if self.mode not in _MERGING:
            return
        sites = self.merged_sites
        unknown = [site for site in sites if site not in SITES]
        if unknown or len(set(sites)) < len(sites):
            raise ValueError(f"sites are some of {', '.join(SITES)}, joined by +.")
        both = [site for site in sites if f"{site}-kv" in sites]
        if both:
            raise ValueError(f"{both[0]} already merges the keys and values.")
        if self.blocks and not self.sites:
            raise ValueError("blocks needs sites.")
        if not self.merged_blocks:
            raise ValueError(f"blocks must be FIRST-LAST, not {self.blocks[:80]!r}.")

    @property
    def merged_sites(self) -> tuple[str, ...]:
        """Sites by name; none for every attention."""
        return tuple(self.sites.split("+")) if self.sites else ()

    @property
    def merged_blocks(self) -> range:
        """Numbers of the blocks that merge; empty for text that is no range."""
        first, _, last = (self.blocks or f"0-{MAX_STEPS}").partition("-")
        ends = (first, last or first)
        numbers = [int(each) if each.isdecimal() and len(each) < 5 else -1 for each in ends]
        return range(numbers[0], numbers[1] + 1) if min(numbers) >= 0 else range(0)


@dataclass(frozen=True, eq=False)
class StepCache(TechniqueConfig):
    """Steps in which the transformer blocks run; the others reuse their cached residual.

    each: the first `warmup` steps, then every `each`-th. computed: so many steps, which calibrate
    has chosen for the model (or the table `file` lists). threshold: whenever the estimated change
    of the output exceeds it, after `warmup` steps.
    order: 0 reuses the last residual, 1 extrapolates linearly from the last two.
    """

    MODES = (OFF, "every", "table", "online")
    ACCELERATION = "mlx_sora.accel.step_cache:ResidualCache"

    each: int = integer({"every": None}, 1, MAX_STEPS)
    computed: int = integer({"table": None}, 1, MAX_STEPS)
    threshold: float = real({"online": 0.15}, 0, 100)
    warmup: int = integer({"every": 6, "online": 5}, 1, MAX_STEPS)
    order: int = integer({"every": 0, "table": 0, "online": 0}, 0, 1)
    file: str = text({"table": ""})


@dataclass(frozen=True, eq=False)
class GuidanceInterval(TechniqueConfig):
    """Guidance only in steps that start at a flow time from `low` to `high`."""

    MODES = (OFF, "")
    ACCELERATION = "mlx_sora.accel.guidance_interval:IntervalGuidance"

    low: float = real({"": None}, 0, 1000)
    high: float = real({"": None}, 0, 1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != OFF and self.low > self.high:
            raise UsageError(f"--guidance-interval {self} is empty.", "Give the lower time first.")


@dataclass(frozen=True, eq=False)
class GuidanceCache(TechniqueConfig):
    """Unconditional prediction in every `each`-th step, after the share `after` of the steps.

    boost: weight of the low frequencies of the cached difference at first, of the high ones later.
    """

    MODES = (OFF, "every")
    ACCELERATION = "mlx_sora.accel.guidance_cache:UncondCache"

    each: int = integer({"every": None}, 1, MAX_STEPS)
    after: float = real({"every": 0.333}, 0, 1)
    boost: float = real({"every": 1}, 0, 10)
