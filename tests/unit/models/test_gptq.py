"""Compensated weights: packed as MLX packs, and of less error on the inputs that they are for."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora.models.gptq import compensate, pack
from mlx_sora.models.quantized import Quantization

INPUTS, OUTPUTS = 192, 24


def restored(form: Quantization, arrays: dict[str, mx.array]) -> np.ndarray:
    return np.asarray(form.rotate(form.dequantize(arrays, mx.float32)), np.float64)


def error(weight: mx.array, found: np.ndarray, moments: mx.array) -> float:
    """Squared error of the layer's output over the inputs of these moments."""
    change = np.asarray(weight, np.float64) - found
    return float(np.sum((change @ np.asarray(moments, np.float64)) * change))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_reads_them(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 128)).astype(np.uint8)
    packed, ones = pack(codes, bits), mx.ones((3, 2))
    found = mx.dequantize(packed, ones, mx.zeros_like(ones), group_size=64, bits=bits)
    assert np.array_equal(np.asarray(found), codes)


@pytest.mark.parametrize("form", [Quantization(3), Quantization(4, rotation=64)])
def test_less_error_on_correlated_inputs_and_no_more_on_others(form: Quantization) -> None:
    weight = mx.random.normal((OUTPUTS, INPUTS), key=mx.random.key(0))
    mix = mx.random.normal((INPUTS, INPUTS), key=mx.random.key(1))
    correlated = mix @ mx.diag(mx.linspace(0.0, 3.0, INPUTS)) @ mix.T
    plain = restored(form, form.quantize(weight, mx.float32))
    for moments, most in ((correlated, 0.6), (100 * mx.eye(INPUTS), 1.05)):
        arrays = compensate(weight, moments, form, mx.float32)
        assert {name: value.shape for name, value in arrays.items()} == form.packed_shapes(
            weight.shape
        )
        found = error(weight, restored(form, arrays), moments)
        assert found < most * error(weight, plain, moments)


def test_unused_and_equal_weights() -> None:
    """A layer without inputs is rounded as it is; a row of equal weights stays so."""
    form = Quantization(4)
    weight = mx.concatenate(
        [mx.full((1, INPUTS), 0.3), mx.zeros((1, INPUTS)), mx.ones((1, INPUTS))]
    )
    arrays = compensate(weight, mx.zeros((INPUTS, INPUTS)), form)
    assert arrays["scales"].dtype == form.quantize(weight)["scales"].dtype
    assert np.abs(restored(form, arrays) - np.asarray(weight)).max() < 2e-3
