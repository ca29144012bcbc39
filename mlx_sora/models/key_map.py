"""Maps from checkpoint tensors to module parameters.

Attribute names of a network equal the names in its checkpoint where MLX allows. The exceptions are
one table of `KeyRule`s at the end of the network's file, which `KeyMap` applies. No data is read:
the same map serves loading and the check of full-size manifests without weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Protocol

import mlx.core as mx

Shape = tuple[int, ...]

#: Axes of torch's output-first 3-D convolution kernels in MLX's channels-last order.
CONV3D = (0, 2, 3, 4, 1)


@dataclass(frozen=True)
class KeyRule:
    """One exception: checkpoint names that fully match `pattern` have another name or layout.

    target: parameter path as a replacement template of `re`; None keeps the name.
    axes: permutation of the stored tensor's axes; empty keeps them.
    flatten: after the permutation, fold all axes but the first into one (conv kernel -> matrix).
    squeeze: drop axes of length 1 after the second (1x1 conv kernel -> matrix).
    ignore: the tensor is known but not used (a duplicate, or a decoder that the model lacks).
    """

    pattern: str
    target: str | None = None
    axes: tuple[int, ...] = ()
    flatten: bool = False
    squeeze: bool = False
    ignore: bool = False


class Convert(Protocol):
    """Conversion of a stored tensor to a parameter."""

    def __call__(self, array: mx.array, stream: mx.Stream | None = None) -> mx.array:
        """Return the parameter; lazy on `stream`, None for the default of the thread."""


@dataclass(frozen=True)
class Parameter:
    """Parameter that a checkpoint tensor fills: path, shape and conversion of the data.

    convert: takes the tensor, and maybe a stream. transposed: it copies. float32: the parameter is
    float32 in memory, whatever the type of the run.
    """

    path: str
    shape: Shape
    convert: Convert
    float32: bool = False
    transposed: bool = False

    def memory_dtype(self, run: mx.Dtype) -> mx.Dtype:
        """Return the type in memory of floating values in a run of type `run`."""
        return mx.float32 if self.float32 else run


@dataclass(frozen=True)
class KeyMap:
    """Rules of one network, tried in order. A name without a rule keeps its name and layout.

    optional: parameters with a computed default, which a checkpoint may lack.
    float32: constants that stay float32 in runs of any type (see `precision`).
    """

    rules: Sequence[KeyRule] = ()
    optional: frozenset[str] = field(default_factory=frozenset)
    float32: frozenset[str] = field(default_factory=frozenset)

    def find_parameter(self, key: str, shape: Shape) -> Parameter | None:
        """Return the parameter that tensor `key` of `shape` fills, or None if it is ignored."""
        for rule in self.rules:
            match = re.fullmatch(rule.pattern, key)
            if match is None:
                continue
            if rule.ignore:
                return None
            path = match.expand(rule.target) if rule.target is not None else key
            return Parameter(
                path,
                _target_shape(rule, shape),
                partial(_convert, rule),
                path in self.float32,
                bool(rule.axes) and _fits(rule, len(shape)),
            )
        return Parameter(key, shape, partial(_convert, KeyRule("")), key in self.float32)


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


def _convert(rule: KeyRule, array: mx.array, stream: mx.Stream | None = None) -> mx.array:
    shape = _target_shape(rule, array.shape)
    if rule.axes and _fits(rule, array.ndim):
        # Every convolution would copy a kernel that is a strided view.
        transposed = mx.transpose(array, rule.axes, stream=stream)
        array = mx.contiguous(transposed, stream=stream)
    return array if array.shape == shape else mx.reshape(array, shape, stream=stream)
