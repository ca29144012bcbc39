"""Linear layers whose weights stay quantized in memory.

On GPUs, MLX's kernel multiplies with the quantized weights. On CPU that kernel is forty times
slower than a plain product, so there each use dequantizes the weights first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_sora.models.ops import hadamard, on_gpu
from mlx_sora.models.precision import ROUNDING

#: Bits of the words that quantized weights are packed into.
WORD_BITS = 32

#: Weights of a row that kernels of GPUs multiply at a time.
KERNEL_ROW = 64

#: Weights that are rotated or rounded to small floats at a time, and the memory that it takes.
QUANTIZED_SLICE = 1 << 16
QUANTIZED_SLICE_BYTES = 24 * 4 * QUANTIZED_SLICE

#: Mode of integer codes with a scale and a bias per group.
AFFINE = "affine"

#: Modes of small floats with an 8-bit scale per group: bits per weight, and weights in a group.
FLOAT_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}


@dataclass(frozen=True)
class Quantization:
    """Form of the quantized weights of a linear layer.

    bits: per weight. group_size: weights in a row that share a scale. mode: as in `mx.quantize`.
    rotation: largest size of the Hadamard blocks that rotate each row of the weights, and the
    inputs; 0 for none. It spreads outliers over a block, so that rounding costs less (QuaRot,
    LRQ-DiT).
    """

    bits: int
    group_size: int = 64
    mode: str = AFFINE
    rotation: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values as in the config.json of other MLX models, without defaults."""
        values: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        if self.mode != AFFINE:
            values["mode"] = self.mode
        return values | ({"rotation": self.rotation} if self.rotation else {})

    def __str__(self) -> str:
        kind = f"{self.bits} bits" if self.mode == AFFINE else self.mode
        return f"{kind} in groups of {self.group_size}" + (", rotated" if self.rotation else "")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the arrays that replace a weight."""
        return ("weight", "scales", "biases") if self.mode == AFFINE else ("weight", "scales")

    @property
    def bits_per_weight(self) -> float:
        """Bits with scales and biases, which take 16 bits each in affine mode and 8 in others."""
        return self.bits + (32 if self.mode == AFFINE else 8) / self.group_size

    def fits(self, inputs: int) -> bool:
        """Return True if rows of `inputs` weights divide into what the kernels take.

        That is whole groups, and on CUDA 64 weights or more.
        """
        return inputs % max(KERNEL_ROW, self.group_size) == 0

    def packed_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return shapes of the arrays that replace a weight [outputs, inputs], by parameter."""
        outputs, inputs = shape
        groups = (outputs, inputs // self.group_size)
        packed = (outputs, inputs * self.bits // WORD_BITS)
        return {name: packed if name == "weight" else groups for name in self.parameters}

    def zeros(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """Return arrays of zeros in place of a weight [outputs, inputs], by parameter."""
        floats = mx.float32 if self.mode == AFFINE else mx.uint8
        return {
            name: mx.zeros(packed, mx.uint32 if name == "weight" else floats)
            for name, packed in self.packed_shapes(shape).items()
        }

    def rotate(self, x: mx.array, stream: mx.Stream | None = None) -> mx.array:
        """Multiply the last axis by the block Hadamard matrix, which is its own inverse."""
        if not self.rotation:
            return x
        return hadamard(x, math.gcd(x.shape[-1], self.rotation), stream)

    @property
    def kernel_options(self) -> dict[str, Any]:
        """Keywords of MLX's functions."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def quantize(
        self, weight: mx.array, dtype: mx.Dtype | None = None, stream: mx.Stream | None = None
    ) -> dict[str, mx.array]:
        """Quantize the weight [outputs, inputs] of a layer; return arrays by parameter name.

        dtype: of scales and biases; None selects the more accurate 16-bit type for them: float16 is
        eight times finer, except for the smallest numbers. stream: runs the work.
        """
        packed, *floats = self._quantize_slices(weight, stream)
        if self.mode == AFFINE:
            scales, biases = floats
            kind = dtype or min(
                (mx.float16, mx.bfloat16), key=lambda kind: _rounding_error(scales, biases, kind)
            )
            floats = [value.astype(kind, stream=stream) for value in floats]
        return dict(zip(self.parameters, (packed, *floats), strict=True))

    def _quantize_slices(self, weight: mx.array, stream: mx.Stream | None) -> list[mx.array]:
        """Return codes, scales and maybe biases; a rotation and small floats take slices of rows.

        On CPUs, MLX rounds to small floats in twenty times the memory of the weights.
        """
        plain = self.mode == AFFINE and not self.rotation
        rows = len(weight) if plain else max(1, QUANTIZED_SLICE // weight.shape[1])
        slices = []
        for part in mx.split(weight, list(range(rows, len(weight), rows)), stream=stream):
            rotated = self.rotate(part.astype(ROUNDING, stream=stream), stream)
            slices.append(mx.quantize(rotated, stream=stream, **self.kernel_options))
            if rows < len(weight):
                mx.eval(slices[-1])
        if len(slices) == 1:
            return list(slices[0])
        return [mx.concatenate(list(each), stream=stream) for each in zip(*slices, strict=True)]

    def restore(self, arrays: Mapping[str, mx.array]) -> mx.array:
        """Return W [outputs, inputs] of `quantize`'s arrays in float32, not rotated."""
        return self.rotate(self.dequantize(arrays, mx.float32))

    def dequantize(self, arrays: Mapping[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """Return W [outputs, inputs] of `quantize`'s arrays; with a rotation H, W H."""
        return mx.dequantize(
            arrays["weight"],
            arrays["scales"],
            arrays.get("biases"),
            dtype=dtype,
            **self.kernel_options,
        )


def _rounding_error(scales: mx.array, biases: mx.array, kind: mx.Dtype) -> float:
    """Return the squared error of the largest codes with scales and biases in `kind`."""
    error = scales.astype(kind).astype(ROUNDING) - scales
    shift = biases.astype(kind).astype(ROUNDING) - biases
    total: mx.array = (mx.square(255 * error) + mx.square(shift)).sum()
    return float(total.item())  # type: ignore[arg-type]


class QuantizedLinear(nn.Module):
    """x Wᵀ + bias with quantized W; parameters are named as in MLX's own quantized layers.

    weight uint32 [outputs, inputs · bits / 32], scales and, in affine mode, biases
    [outputs, inputs / group_size]: W = scale · code + bias per group. bias [outputs], or none.
    With a rotation H, W is stored as W H, and x becomes x H.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, **form: Any) -> None:
        """Make a layer of zeros. form: fields of `Quantization`."""
        super().__init__()
        self.form = kind = Quantization(**form)
        self.dense_size, self.inputs = outputs * inputs, inputs
        for name, zeros in kind.zeros((outputs, inputs)).items():
            self[name] = zeros
        if bias:
            self.bias = mx.zeros((outputs,))

    def dequantize(self, x: mx.array) -> mx.array:
        """Return W [outputs, inputs] for the product with `x`, or with a rotation H, W H."""
        arrays = {name: self[name] for name in self.form.parameters}
        # Without this dependency on x, MLX would dequantize the weights of a whole block at once.
        arrays["weight"] = mx.depends(arrays["weight"], x)
        dtype = self.scales.dtype if self.form.mode == AFFINE else x.dtype
        return self.form.dequantize(arrays, dtype)

    def product(self, x: mx.array) -> Callable[[mx.array], mx.array]:
        """Return this layer for the rows of `x`, dequantized once, after `x` is computed."""
        weight = self.dequantize(x)
        if x.size < weight.size:
            return lambda rows: self._multiply(weight, self.form.rotate(rows))
        return partial(self._multiply, self.form.rotate(weight))

    def __call__(self, x: mx.array) -> mx.array:
        if not on_gpu():
            return self.product(x)(x)
        out = mx.quantized_matmul(
            self.form.rotate(x),
            self.weight,
            self.scales,
            self.get("biases"),
            transpose=True,
            **self.form.kernel_options,
        )
        return out + self.bias if "bias" in self else out

    def _multiply(self, weight: mx.array, x: mx.array) -> mx.array:
        return mx.addmm(self.bias, x, weight.T) if "bias" in self else x @ weight.T


class QuantizedEmbedding(nn.Module):
    """Table of quantized rows [count, channels]; parameters are named as in `QuantizedLinear`."""

    def __init__(self, count: int, channels: int, **form: Any) -> None:
        """Make a table of zeros. form: fields of `Quantization`."""
        super().__init__()
        self.form = Quantization(**form)
        for name, zeros in self.form.zeros((count, channels)).items():
            self[name] = zeros

    def __call__(self, ids: mx.array) -> mx.array:
        """Return the rows of `ids`, float32 [.., channels]."""
        return self.form.restore({name: self[name][ids] for name in self.form.parameters})


def dequantize_once(linear: nn.Module, x: mx.array) -> Callable[[mx.array], mx.array]:
    """Return `linear` for several calls after `x` is computed, dequantized only once."""
    if isinstance(linear, QuantizedLinear) and not on_gpu():
        return linear.product(x)
    return linear


def select_outputs(linear: nn.Module, rows: slice) -> nn.Module:
    """Return the layer that computes these outputs of `linear`, with the same weights."""
    part: nn.Module = copy.copy(linear)
    for name in ("weight", "scales", "biases", "bias"):
        if name in part:
            part[name] = part[name][rows]
    return part
