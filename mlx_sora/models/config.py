"""Reading a network's published config.json into its frozen configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from mlx_sora.errors import WeightsError

Config = TypeVar("Config")

FIX = "Use the config.json that was published with the weights."


def read_config(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """`cls` from a config.json's object; unknown keys are ignored, absent ones keep the default.

    Lists become tuples. Raises WeightsError for a value of another type than the default's.
    """
    known: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in values:
            continue
        value, default = values[field.name], field.default
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise WeightsError(f"{field.name} cannot be {value!r} in a model's config.json.", FIX)
        known[field.name] = value
    return cls(**known)


def require(condition: bool, message: str) -> None:
    """Raise WeightsError with `message` unless a configuration's `condition` holds."""
    if not condition:
        raise WeightsError(f"{message} in a model's config.json.", FIX)
