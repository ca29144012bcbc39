"""Checking a network against the full-size list of checkpoint tensors, without any weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_sora.models.key_map import KeyMap

#: What building may cost: random keys and scalars, never a weight.
SMALL = 1 << 16


@contextmanager
def nothing_allocated() -> Iterator[None]:
    """Fail when MLX holds noticeably more memory after the block than before, or peaks higher."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    yield
    peak = max(mx.get_peak_memory(), mx.get_active_memory())
    assert peak - before < SMALL, f"{peak - before} bytes allocated while building"


def check_manifest(module: nn.Module, keys: KeyMap, manifest: Mapping[str, Any]) -> None:
    """Every key of `manifest` (name -> [shape, dtype]) fills one parameter; none is left empty.

    Parameters that `keys` calls optional may be in the manifest and need not be.
    """
    wanted = {path: tuple(value.shape) for path, value in tree_flatten(module.parameters())}
    filled: dict[str, str] = {}
    for key, (shape, _) in manifest.items():
        place = keys.find_parameter(key, tuple(shape))
        assert place is not None, f"{key} is ignored"
        assert place.path in wanted, f"{key} goes to {place.path}, which is no parameter"
        assert place.path not in filled, f"{key} and {filled[place.path]} fill {place.path}"
        assert place.shape == wanted[place.path], (
            f"{key} becomes {place.shape}, {place.path} is {wanted[place.path]}"
        )
        filled[place.path] = key
    empty = set(wanted) - set(filled) - keys.optional
    assert not empty, f"no tensor for {sorted(empty)[:5]}"
