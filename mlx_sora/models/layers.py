"""MLX's layers and `mx.compile`, without what they leave in the thread that uses them.

MLX keeps random numbers and compiled graphs per thread, as Python objects that it frees after
Python has done with the thread. If the process ends meanwhile, it aborts (MLX 0.32, Python 3.12 and
older). So networks are built without MLX's random state, which also leaves the caller's random
numbers alone, and each thread has compiled functions of its own, which end with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import mlx.core as mx
from mlx import nn

Params = ParamSpec("Params")
Result = TypeVar("Result")


def compiled(
    function: Callable[Params, Result], *, shapeless: bool = False
) -> Callable[Params, Result]:
    """Return `function` compiled by `mx.compile`, for each thread that calls it by itself."""
    own = threading.local()

    @wraps(function)
    def call(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        try:
            compiled_function = own.function
        except AttributeError:
            compiled_function = own.function = mx.compile(function, shapeless=shapeless)
        result: Result = compiled_function(*args, **kwargs)
        return result

    return call


class Linear(nn.Linear):
    """x Wᵀ + bias, with W [outputs, inputs] drawn from a fixed key until weights are loaded."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        nn.Module.__init__(self)
        scale = inputs**-0.5
        self.weight = mx.random.uniform(-scale, scale, (outputs, inputs), key=mx.random.key(0))
        if bias:
            self.bias = mx.random.uniform(-scale, scale, (outputs,), key=mx.random.key(1))


class Embedding(nn.Embedding):
    """Rows of a table [count, channels], drawn from a fixed key until weights are loaded."""

    def __init__(self, count: int, channels: int) -> None:
        nn.Module.__init__(self)
        self.weight = mx.random.normal(
            (count, channels), scale=channels**-0.5, key=mx.random.key(0)
        )
