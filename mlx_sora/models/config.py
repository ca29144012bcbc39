"""Read a network's published config.json into a frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from mlx_sora.errors import WeightsError, printable

Config = TypeVar("Config")

#: Bounds of a configuration's numbers and list lengths: far above any published one.
MAX_NUMBER, MAX_LIST = 1 << 20, 16

#: Largest number of blocks: each is built before its weights are looked for.
MAX_DEPTH = 200

FIX = "Use the config.json that was published with the weights."


class NetworkConfig:
    """Base of the frozen dataclasses that hold a network's configuration."""

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Make a configuration from the object of a config.json.

        Unknown keys are ignored, absent ones keep their default, and lists become tuples. Raises
        WeightsError for a value whose type differs from the default's, and for implausible numbers.
        """
        known: dict[str, Any] = {}
        for field in fields(cls):  # type: ignore[arg-type]
            if field.name not in values:
                continue
            value, default = values[field.name], field.default
            if isinstance(value, list):
                value = tuple(value)
            if isinstance(default, float) and type(value) is int and abs(value) <= MAX_NUMBER:
                value = float(value)
            if type(value) is not type(default) or not _is_valid(value, default):
                shown = printable(repr(value), 80)
                raise WeightsError(f"{field.name} cannot be {shown} in a model's config.json.", FIX)
            known[field.name] = value
        return cls(**known)


def _is_valid(value: Any, default: Any) -> bool:
    if isinstance(value, tuple):
        kind = type(default[0])
        items = (type(item) is kind and _is_valid(item, default[0]) for item in value)
        return 0 < len(value) <= MAX_LIST and all(items)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return 0 < value <= MAX_NUMBER
    return True


def get_object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the object `name` of a config.json, or an empty one. Raises WeightsError."""
    found = values.get(name) or {}
    require(isinstance(found, dict), f"{name} is not an object")
    return found


def require(condition: bool, message: str) -> None:
    """Raise WeightsError with `message` unless `condition` holds."""
    if not condition:
        raise WeightsError(f"{message} in a model's config.json.", FIX)
