"""How checkpoint tensors become module parameters.

A network's attribute names equal the checkpoint's names where MLX allows. What differs stands in
one table of `Rule`s at the end of the network's file; `KeyMap` applies it. Nothing here touches
data: the same map serves loading, and the check of full-size manifests without a single weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod

import mlx.core as mx

Shape = tuple[int, ...]

#: torch's output-first convolution kernels to MLX's channels-last ones.
CONV2D = (0, 2, 3, 1)
CONV3D = (0, 2, 3, 4, 1)


@dataclass(frozen=True)
class KeyRule:
    """One exception: checkpoint names that fully match `pattern` go to `target` in another layout.

    target: parameter path as an `re` replacement template; None keeps the name.
    axes: permutation applied to the stored tensor; empty keeps the layout.
    flatten: after the permutation, fold all axes but the first into one (conv kernel -> matrix).
    squeeze: drop axes of length 1 behind the second (1x1 conv kernel -> matrix).
    ignore: the tensor is known and has no use here (a duplicate, a decoder the model lacks).
    """

    pattern: str
    target: str | None = None
    axes: tuple[int, ...] = ()
    flatten: bool = False
    squeeze: bool = False
    ignore: bool = False


@dataclass(frozen=True)
class Parameter:
    """Where one checkpoint tensor goes: parameter `path`, its `shape` there, and the data's way."""

    path: str
    shape: Shape
    convert: Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class KeyMap:
    """Rules of one network, tried in order; a name without a rule keeps name and layout.

    optional: parameters that have a computed default when the checkpoint does not hold them.
    """

    rules: Sequence[KeyRule] = ()
    optional: frozenset[str] = field(default_factory=frozenset)

    def find_parameter(self, key: str, shape: Shape) -> Parameter | None:
        """Parameter that tensor `key` of `shape` fills, or None if it is to be ignored."""
        for rule in self.rules:
            match = re.fullmatch(rule.pattern, key)
            if match is None:
                continue
            if rule.ignore:
                return None
            path = match.expand(rule.target) if rule.target is not None else key
            return Parameter(path, _target_shape(rule, shape), partial(_convert, rule))
        return Parameter(key, shape, lambda a: a)


def _fits(rule: KeyRule, ndim: int) -> bool:
    return not rule.axes or len(rule.axes) == ndim


def _target_shape(rule: KeyRule, shape: Shape) -> Shape:
    if rule.axes and _fits(rule, len(shape)):
        shape = tuple(shape[a] for a in rule.axes)
    if rule.flatten:
        shape = (shape[0], prod(shape[1:]))
    if rule.squeeze:
        shape = shape[:2] + tuple(n for n in shape[2:] if n != 1)
    return shape


def _convert(rule: KeyRule, array: mx.array) -> mx.array:
    shape = _target_shape(rule, array.shape)
    if rule.axes and _fits(rule, array.ndim):
        # Left as a strided view, a kernel would be copied again by every convolution.
        array = mx.contiguous(array.transpose(rule.axes))
    return array.reshape(shape)
