"""Linear layers whose weights stay quantized in memory.

On GPUs, MLX's kernel multiplies with the quantized weights. On CPU that kernel is forty times
slower than a plain product, so there each use dequantizes the weights first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import mlx.core as mx
from mlx import nn

from mlx_sora.models.ops import on_gpu

#: Bits of the words that quantized weights are packed into.
WORD_BITS = 32


class QuantizedLinear(nn.Module):
    """x Wᵀ + bias with affine quantized W; parameters are named as in MLX's own quantized layers.

    weight uint32 [outputs, inputs · bits / 32], scales and biases [outputs, inputs / group_size]:
    W = scale · code + bias per group. bias [outputs], or none.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, bits: int, group_size: int
    ) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size
        self.dense_size = outputs * inputs
        self.weight = mx.zeros((outputs, inputs * bits // WORD_BITS), mx.uint32)
        self.scales = mx.zeros((outputs, inputs // group_size))
        self.biases = mx.zeros((outputs, inputs // group_size))
        if bias:
            self.bias = mx.zeros((outputs,))

    def dequantize(self, x: mx.array) -> mx.array:
        """Return W [outputs, inputs] in the type of the scales, for the product with `x`."""
        # Without this dependency on x, MLX would dequantize the weights of a whole block at once.
        return mx.dequantize(
            mx.depends(self.weight, x),
            self.scales,
            self.biases,
            group_size=self.group_size,
            bits=self.bits,
        )

    def __call__(self, x: mx.array) -> mx.array:
        if not on_gpu():
            return self._multiply(self.dequantize(x), x)
        out = mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
        )
        return out + self.bias if "bias" in self else out

    def _multiply(self, weight: mx.array, x: mx.array) -> mx.array:
        return mx.addmm(self.bias, x, weight.T) if "bias" in self else x @ weight.T


def dequantize_once(linear: nn.Module, x: mx.array) -> Callable[[mx.array], mx.array]:
    """Return `linear` for several calls after `x` is computed, dequantized only once."""
    if isinstance(linear, QuantizedLinear) and not on_gpu():
        return partial(linear._multiply, linear.dequantize(x))
    return linear


def select_outputs(linear: nn.Module, rows: slice) -> nn.Module:
    """Return the layer that computes these outputs of `linear`, with the same weights."""
    part: nn.Module = copy.copy(linear)
    for name in ("weight", "scales", "biases", "bias"):
        if name in part:
            part[name] = part[name][rows]
    return part
