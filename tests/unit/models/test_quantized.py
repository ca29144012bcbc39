"""Quantized layers against plain ones with the same, dequantized weights."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx import nn

from mlx_sora.models.ops import on_gpu
from mlx_sora.models.quantized import QuantizedLinear, dequantize_once
from tests.helpers.golden import relative_error

#: On CPU a quantized layer is the plain product; the kernel of GPUs adds in another order.
SAME = 1e-4 if on_gpu() else 0.0


def pair(bits: int, bias: bool) -> tuple[QuantizedLinear, nn.Linear]:
    """A quantized layer, and the plain one that it stands for."""
    mx.random.seed(1)
    plain = nn.Linear(128, 24, bias=bias)
    layer = QuantizedLinear(128, 24, bias=bias, bits=bits, group_size=64)
    weight, scales, biases = mx.quantize(mx.random.normal((24, 128)), group_size=64, bits=bits)
    assert layer.weight.shape == weight.shape
    assert layer.scales.shape == scales.shape
    assert layer.weight.dtype == weight.dtype
    layer.update({"weight": weight, "scales": scales, "biases": biases})
    plain.weight = mx.dequantize(weight, scales, biases, group_size=64, bits=bits)
    if bias:
        layer.bias = plain.bias = mx.random.normal((24,))
    return layer, plain


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_as_the_plain_layer(bits: int, bias: bool) -> None:
    layer, plain = pair(bits, bias)
    x = mx.random.normal((2, 5, 128))
    assert relative_error(layer(x), plain(x)) <= SAME
    assert relative_error(dequantize_once(layer, x)(x), plain(x)) <= SAME
    assert layer.dense_size == plain.weight.size


@pytest.mark.parametrize("bias", [True, False])
def test_the_kernel_of_gpus_agrees(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plain = pair(8, bias)
    x = mx.random.normal((3, 128))
    monkeypatch.setattr("mlx_sora.models.quantized.on_gpu", lambda: True)
    assert dequantize_once(layer, x) is layer
    assert mx.allclose(layer(x), plain(x), rtol=1e-4, atol=1e-4).item()


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_scales_in_half_precision(
    dtype: mx.Dtype, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_sora.models.quantized.on_gpu", lambda: gpu)
    layer, plain = pair(8, True)
    layer.set_dtype(dtype)
    x = mx.random.normal((3, 128)).astype(dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert layer.weight.dtype == mx.uint32
    # 200 draws: 6.7 epsilons at most; MLX's kernel, run on a CPU, adds in half precision: 13.2.
    error = relative_error(out.astype(mx.float32), plain(x.astype(mx.float32)))
    assert error < (16 if gpu else 8) * mx.finfo(dtype).eps


def test_a_plain_layer_serves_pieces_as_it_is() -> None:
    layer = nn.Linear(4, 4)
    assert dequantize_once(layer, mx.zeros((1, 4))) is layer
