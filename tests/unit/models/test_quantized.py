"""Quantized layers against plain ones with the same, dequantized weights."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx import nn

from mlx_sora.loading.quantization import named_form
from mlx_sora.memory.limits import release
from mlx_sora.models.ops import hadamard, on_gpu, use_forms
from mlx_sora.models.quantized import (
    Quantization,
    QuantizedLinear,
    dequantize_once,
    select_outputs,
)
from mlx_sora.models.t5 import GatedGelu, T5Config
from mlx_sora.request.options import FLOAT_FORMS, WIDTHS
from tests.helpers.golden import relative_error

#: On CPU a quantized layer is the plain product; the kernel of GPUs adds in another order.
SAME = 1e-4 if on_gpu() else 0.0


def pair(
    form: Quantization, bias: bool = True, inputs: int = 128
) -> tuple[QuantizedLinear, nn.Linear]:
    """A quantized layer, and the plain one that it stands for."""
    mx.random.seed(1)
    plain = nn.Linear(inputs, 24, bias=bias)
    layer = QuantizedLinear(inputs, 24, bias=bias, **form.to_dict())
    arrays = form.quantize(mx.random.normal((24, inputs)), mx.float32)
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
        name: (layer[name].shape, layer[name].dtype) for name in form.parameters
    }
    layer.update(arrays)
    plain.weight = form.rotate(form.dequantize(arrays, mx.float32))
    if bias:
        layer.bias = plain.bias = mx.random.normal((24,))
    return layer, plain


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_as_the_plain_layer(bits: int, bias: bool) -> None:
    layer, plain = pair(Quantization(bits), bias)
    x = mx.random.normal((2, 5, 128))
    assert relative_error(layer(x), plain(x)) <= SAME
    assert relative_error(dequantize_once(layer, x)(x), plain(x)) <= SAME
    assert layer.dense_size == plain.weight.size


@pytest.mark.parametrize("name", [*WIDTHS, *FLOAT_FORMS])
@pytest.mark.parametrize("rows", [3, 90])
def test_every_form_on_cpus_and_gpus(name: int | str, rows: int) -> None:
    """Few rows are rotated, or else the weights; the kernel of GPUs rotates rows always."""
    layer, plain = pair(named_form(name), inputs=192)
    x = mx.random.normal((rows, 192), key=mx.random.key(2))
    with use_forms(gpu=False):
        assert relative_error(layer(x), plain(x)) <= 2e-6
        assert relative_error(dequantize_once(layer, x)(x[1:]), plain(x[1:])) <= 2e-6
        part = select_outputs(layer, slice(8, 16))
        assert relative_error(part(x), plain(x)[:, 8:16]) <= 2e-6
    with use_forms(gpu=True):
        assert dequantize_once(layer, x) is layer
        assert relative_error(layer(x), plain(x)) <= 1e-4


@pytest.mark.parametrize("width", [1152, 192, 10240])
def test_a_rotation_is_exact(width: int) -> None:
    """(x H)(W H)ᵀ = x Wᵀ in float32, at the widths of STDiT and T5, too."""
    form = Quantization(4, rotation=128)
    x, w = (mx.random.normal((64, width), key=mx.random.key(n)) for n in range(2))
    for gpu in (False, True):
        with use_forms(gpu=gpu):
            assert relative_error(form.rotate(x) @ form.rotate(w).T, x @ w.T) <= 1e-5
            assert relative_error(form.rotate(form.rotate(x)), x) <= 1e-5
    assert mx.allclose(hadamard(mx.eye(64), 64), mx.hadamard_transform(mx.eye(64))).item()


def test_a_rotation_loses_less_where_there_are_outliers() -> None:
    w = mx.random.normal((64, 256), key=mx.random.key(1))
    w[:, 5] *= 20
    errors = []
    for form in (Quantization(4), named_form(4)):
        back = form.rotate(form.dequantize(form.quantize(w, mx.float32), mx.float32))
        errors.append(relative_error(back, w))
    assert errors[1] < 0.75 * errors[0]


def test_slices_are_those_of_the_whole_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    w = mx.random.normal((300, 512), key=mx.random.key(1))
    for name in (4, "mxfp4"):
        form = named_form(name)
        expected = mx.quantize(form.rotate(w), **form.kernel_options)
        mx.eval(expected)
        monkeypatch.setattr("mlx_sora.models.quantized.QUANTIZED_SLICE", 1 << 13)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        found = form.quantize(w, mx.float32)
        mx.eval(found)
        assert mx.get_peak_memory() - before < 3 * w.nbytes
        monkeypatch.undo()
        assert all(
            mx.array_equal(a, b).item() for a, b in zip(found.values(), expected, strict=True)
        )


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", [8, 6, "mxfp8"])
def test_half_precision(dtype: mx.Dtype, gpu: bool, name: int | str) -> None:
    layer, plain = pair(named_form(name))
    layer.set_dtype(dtype)
    x = mx.random.normal((3, 128)).astype(dtype)
    with use_forms(gpu=gpu):
        out = layer(x)
    assert out.dtype == dtype
    assert layer.weight.dtype == mx.uint32
    # 200 draws: 6.7 epsilons at most; MLX's kernel, run on a CPU, adds in half precision: 13.2.
    error = relative_error(out.astype(mx.float32), plain(x.astype(mx.float32)))
    assert error < (16 if gpu else 8) * mx.finfo(dtype).eps


def test_a_plain_layer_serves_pieces_as_it_is() -> None:
    layer = nn.Linear(4, 4)
    assert dequantize_once(layer, mx.zeros((1, 4))) is layer


def test_layers_of_one_input_are_dequantized_one_after_the_other() -> None:
    """As plans count: the words of one layer and its weights, beside nothing of the other."""
    layer = GatedGelu(T5Config(d_model=512, d_ff=4096))
    for name in ("wi_0", "wi_1", "wo"):
        outputs, inputs = layer[name].weight.shape
        layer[name] = QuantizedLinear(inputs, outputs, bias=False, bits=4)
    x = mx.ones((1, 2, 512))
    mx.eval(layer.parameters(), x)
    previous = mx.set_memory_limit(0)  # as a stage that may not allocate ahead
    try:
        release()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(layer(x))
        peak = mx.get_peak_memory() - before
    finally:
        mx.set_memory_limit(previous)
    assert peak < 2.2 * 4 * 512 * 4096
