"""Nested state as JSON and named arrays, for files and for other processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

#: Key of an array's name in the JSON value.
_TENSOR = "$tensor"


def flatten_state(value: Any, name: str, arrays: dict[str, mx.array]) -> Any:
    """Return `value` as JSON; move its arrays to `arrays`, under names that begin with `name`."""
    if isinstance(value, mx.array):
        arrays[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: flatten_state(item, f"{name}.{key}", arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [flatten_state(item, f"{name}.{i}", arrays) for i, item in enumerate(value)]
    return value


def unflatten_state(value: Any, arrays: Mapping[str, mx.array]) -> Any:
    """Invert `flatten_state`. Tuples come back as lists."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return arrays[value[_TENSOR]]
        return {key: unflatten_state(item, arrays) for key, item in value.items()}
    return [unflatten_state(item, arrays) for item in value] if isinstance(value, list) else value
