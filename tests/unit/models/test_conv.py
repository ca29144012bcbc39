"""Convolutions, group norm and upsampling: every form equals the plain sum, whatever the size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora.models import conv, ops
from tests.helpers.tolerance import rounding

#: Two float32 forms of the same sum, in standard deviations of the result.
SAME = rounding(1e-5)

Array = np.ndarray
SIZES = [(1, 1), (1, 6), (2, 3), (5, 4), (8, 8), (7, 9), (24, 17)]


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def difference(a: mx.array, b: mx.array | Array) -> float:
    left, right = np.array(a, np.float64), np.array(b, np.float64)
    assert left.shape == right.shape
    return float(np.abs(left - right).max() / right.std())


def reference(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    padding: list[tuple[int, int]],
    stride: tuple[int, int, int],
) -> Array:
    """Convolution of [T, H, W, I] with [kt, kh, kw, O, I] by its definition, in float64."""
    padded = np.pad(np.array(x, np.float64), [*padding, (0, 0)])
    w = np.array(weight, np.float64)
    size = [(n - k) // s + 1 for n, k, s in zip(padded.shape[:3], w.shape[:3], stride, strict=True)]
    out = np.zeros((*size, w.shape[3]))
    for t, h, c in np.ndindex(*size):
        at = [slice(i * s, i * s + k) for i, s, k in zip((t, h, c), stride, w.shape, strict=False)]
        out[t, h, c] = np.einsum("thwi,thwoi->o", padded[tuple(at)], w)
    return out if bias is None else out + np.array(bias, np.float64)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the shifted forms with the usual blocks, and with blocks of a row or two."""
    if request.param == "many blocks":
        monkeypatch.setattr(conv, "BLOCK_VALUES", 50)


Form2d = Callable[[mx.array, mx.array, mx.array | None], mx.array]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("form", [conv.conv2d, conv.plain_conv2d, conv.shifted_conv2d])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("images", [1, 3])
def test_conv2d(form: Form2d, size: tuple[int, int], images: int) -> None:
    x, weight, bias = normal(1, images, *size, 5), normal(2, 3, 3, 4, 5), normal(3, 4)
    same = [(0, 0), (1, 1), (1, 1)]
    expected = reference(x, weight[None], bias, same, (1, 1, 1))
    assert difference(form(x, weight, bias), expected) <= SAME
    unbiased = reference(x, weight[None], None, same, (1, 1, 1))
    assert difference(form(x, weight, None), unbiased) <= SAME


@pytest.mark.parametrize("size", [(2, 2), (3, 2), (5, 8), (53, 30)])
def test_downsample2d_pads_right_and_bottom_only(size: tuple[int, int]) -> None:
    x, weight, bias = normal(1, 2, *size, 3), normal(2, 3, 3, 4, 3), normal(3, 4)
    y = conv.downsample2d(x, weight, bias)
    assert y.shape == (2, size[0] // 2, size[1] // 2, 4)
    expected = reference(x, weight[None], bias, [(0, 0), (0, 1), (0, 1)], (1, 2, 2))
    assert difference(y, expected) <= SAME


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("form", [conv.upsample_conv2d, conv.subpixel_conv2d])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("images", [1, 2])
def test_upsampling_before_the_kernel_or_within_it(
    form: Form2d, size: tuple[int, int], images: int
) -> None:
    x, weight, bias = normal(1, images, *size, 6), normal(2, 3, 3, 4, 6), normal(3, 4)
    large = mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
    assert mx.array_equal(conv.upsample2x(x), large)
    expected = reference(large, weight[None], bias, [(0, 0), (1, 1), (1, 1)], (1, 1, 1))
    assert difference(form(x, weight, bias), expected) <= SAME


Form3d = Callable[[mx.array, mx.array, mx.array | None, int], mx.array]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("form", [conv.causal_conv3d, conv.plain_conv3d, conv.shifted_conv3d])
@pytest.mark.parametrize("size", [(1, 1), (4, 5), (9, 7)])
@pytest.mark.parametrize(("frames", "stride"), [(1, 1), (2, 1), (5, 1), (2, 2), (4, 2), (20, 2)])
def test_causal_conv3d(form: Form3d, size: tuple[int, int], frames: int, stride: int) -> None:
    x, weight, bias = normal(1, 1, frames, *size, 3), normal(2, 3, 3, 3, 4, 3), normal(3, 4)
    front = [(2 + 1 - stride, 0), (1, 1), (1, 1)]
    expected = reference(x[0], weight, bias, front, (stride, 1, 1))[None]
    assert expected.shape[1] == frames // stride
    assert difference(form(x, weight, bias, stride), expected) <= SAME


@pytest.mark.parametrize("side", [4, 24])
@pytest.mark.parametrize("stride", [1, 2])
def test_causal_conv3d_of_a_batch_is_that_of_each_sample(side: int, stride: int) -> None:
    x, weight = normal(1, 3, 4, side, side, 3), normal(2, 3, 3, 3, 5, 3)
    whole = conv.causal_conv3d(x, weight, None, stride)
    for b in range(3):
        assert mx.array_equal(
            whole[b : b + 1], conv.causal_conv3d(x[b : b + 1], weight, None, stride)
        )


@pytest.mark.parametrize("rows", [1, 3, 4, 9, 10, 18, 26], ids="{} rows".format)
def test_conv2d_in_pieces(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """A kernel does so many rows of 3 images of 9: strips, an image or two, or nearly all."""
    x, weight, bias = normal(1, 3, 9, 7, 5), normal(2, 3, 3, 4, 5), normal(3, 4)
    whole = conv.plain_conv2d(x, weight, bias)
    seen = convolutions(monkeypatch)
    monkeypatch.setattr(ops, "DISPATCH_FLOPS", 2 * rows * 7 * weight.size)
    assert difference(conv.plain_conv2d(x, weight, bias), whole) <= SAME
    if rows < 9:
        strips = {1: [2, *[3] * 7, 2], 3: [4, 5, 4], 4: [4, 5, 4]}[rows]
        assert [shape[:2] for shape in seen] == [(1, strip) for strip in strips] * 3
    else:
        assert [shape[:2] for shape in seen] == ([(1, 9)] * 3 if rows < 18 else [(2, 9), (1, 9)])


@pytest.mark.parametrize(("stride", "frames"), [(1, [3] * 6), (1, [5, 5]), (2, [3, 3, 3])])
def test_conv3d_in_pieces(monkeypatch: pytest.MonkeyPatch, stride: int, frames: list[int]) -> None:
    """A kernel does a frame or three; each needs the two before."""
    x, weight, bias = normal(1, 1, 6, 7, 5, 3), normal(2, 3, 3, 3, 4, 3), normal(3, 4)
    whole = conv.plain_conv3d(x, weight, bias, stride)
    seen = convolutions(monkeypatch)
    steps = (frames[0] - 3) // stride + 1
    monkeypatch.setattr(ops, "DISPATCH_FLOPS", 2 * steps * 7 * 5 * weight.size)
    assert difference(conv.plain_conv3d(x, weight, bias, stride), whole) <= SAME
    assert [shape[1] for shape in seen] == frames


def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that receives the shape of the input of each convolution of MLX."""
    seen: list[tuple[int, ...]] = []
    plain = mx.conv_general

    def watched(x: mx.array, *args: Any, **options: Any) -> mx.array:
        seen.append(x.shape)
        return plain(x, *args, **options)

    monkeypatch.setattr(mx, "conv_general", watched)
    return seen


@pytest.mark.parametrize("biased", [False, True])
def test_one_frame_on_a_gpu_is_one_image(monkeypatch: pytest.MonkeyPatch, biased: bool) -> None:
    """The first two taps in time see only padding, which MLX would multiply."""
    x, weight = normal(1, 2, 1, 7, 9, 3), normal(2, 3, 3, 3, 5, 3)
    bias = normal(3, 5) if biased else None
    expected = mx.concatenate([conv.plain_conv3d(x[b : b + 1], weight, bias) for b in range(2)])
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    seen = convolutions(monkeypatch)
    assert difference(conv.causal_conv3d(x, weight, bias), expected) <= SAME
    assert seen == [(2, 7, 9, 3)]


@pytest.mark.parametrize("side", [4, 24])
def test_causal_conv3d_sees_no_later_frame(side: int) -> None:
    x, weight = normal(1, 1, 6, side, side, 3), normal(2, 3, 3, 3, 5, 3)
    changed = mx.concatenate([x[:, :4], normal(9, 1, 2, side, side, 3)], axis=1)
    y, other = conv.causal_conv3d(x, weight), conv.causal_conv3d(changed, weight)
    assert mx.array_equal(y[:, :4], other[:, :4])
    assert not mx.array_equal(y[:, 4], other[:, 4])


@pytest.mark.skipif(ops.on_gpu(), reason="the shifted form is for CPU")
def test_shifted_rows_need_no_im2col() -> None:
    x, weight = normal(1, 1, 96, 96, 64), normal(2, 3, 3, 64, 64)
    mx.eval(x, weight)
    peaks = []
    for form in (conv.plain_conv2d, conv.conv2d):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(form(x, weight))
        peaks.append(mx.get_peak_memory() - before)
    plain, shifted = peaks
    assert plain > 9 * x.nbytes
    assert shifted < 5 * x.nbytes


def test_pointwise_in_any_number_of_dimensions() -> None:
    layer = conv.Pointwise(5, 3)
    layer.weight, layer.bias = normal(1, 3, 5), normal(2, 3)
    for shape in [(2, 4, 5), (1, 2, 3, 4, 5)]:
        x = normal(3, *shape)
        expected = np.array(x, np.float64) @ np.array(layer.weight, np.float64).T
        assert difference(layer(x), expected + np.array(layer.bias, np.float64)) <= SAME
    unbiased = conv.Pointwise(5, 3, bias=False)
    unbiased.weight = layer.weight
    assert "bias" not in unbiased.parameters()
    assert difference(unbiased(x), expected) <= SAME


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 5, 4, 8), (1, 3, 5, 4, 8), (1, 96, 96, 32)])
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_group_norm(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], groups: int, on_gpu: bool
) -> None:
    """Against float64, on data whose mean is large: there a single-pass variance fails."""
    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    x = normal(1, *shape) * 2 + 5 * normal(2, shape[-1])
    gain, bias = normal(3, shape[-1]), normal(4, shape[-1])
    y = np.array(x, np.float64).reshape(shape[0], -1, groups, shape[-1] // groups)
    y = y - y.mean(axis=(1, 3), keepdims=True)
    y = y / np.sqrt((y**2).mean(axis=(1, 3), keepdims=True) + 1e-6)
    expected = y.reshape(shape) * np.array(gain, np.float64) + np.array(bias, np.float64)
    assert difference(conv.group_norm(x, gain, bias, groups, 1e-6), expected) <= SAME
    activated = expected / (1 + np.exp(-expected))
    assert difference(conv.group_norm(x, gain, bias, groups, 1e-6, silu=True), activated) <= SAME


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("gpu", [False, True])
def test_half_precision_rounds_once_and_avoids_winograd(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, gpu: bool
) -> None:
    """Metal's Winograd refuses flipped kernels; that all are is what can be seen elsewhere."""
    monkeypatch.setattr(ops, "on_gpu", lambda: gpu)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    real, flips = mx.conv_general, []

    def convolve(*args: object, flip: bool, **more: object) -> mx.array:
        flips.append(flip)
        return real(*args, flip=flip, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(mx, "conv_general", convolve)
    x, weight = normal(1, 1, 4, 24, 17, 5).astype(dtype), normal(2, 3, 3, 3, 4, 5).astype(dtype)
    wide, kernel = x.astype(mx.float32), weight.astype(mx.float32)
    pairs = [
        (conv.conv2d(x[0], weight[0]), conv.shifted_conv2d(wide[0], kernel[0])),
        (conv.upsample_conv2d(x[0], weight[0]), conv.subpixel_conv2d(wide[0], kernel[0])),
        (conv.causal_conv3d(x, weight), conv.shifted_conv3d(wide, kernel)),
        (conv.causal_conv3d(x[:, :1], weight), conv.shifted_conv3d(wide[:, :1], kernel)),
        (conv.causal_conv3d(x, weight, None, 2), conv.shifted_conv3d(wide, kernel, None, 2)),
    ]
    for out, expected in pairs:
        assert out.dtype == dtype
        assert mx.allclose(out.astype(mx.float32), expected, rtol=mx.finfo(dtype).eps, atol=1e-4)
    assert all(flips)
    assert len(flips) == len(pairs)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_group_norm_in_half_precision_has_float32_statistics(dtype: mx.Dtype) -> None:
    """Far from zero, where a mean in half precision would be off by more than the spread."""
    x = (100 + normal(1, 1, 40, 40, 8)).astype(dtype)
    weight, bias = mx.ones(8, dtype), mx.zeros(8, dtype)
    exact = conv.group_norm(x.astype(mx.float32), mx.ones(8), mx.zeros(8), 2, 1e-5)
    out = conv.group_norm(x, weight, bias, 2, 1e-5)
    assert out.dtype == dtype
    assert mx.allclose(out.astype(mx.float32), exact, rtol=mx.finfo(dtype).eps, atol=1e-3)


def test_group_norm_of_gpus_rounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision, norm and SiLU are those of float32, whatever shapes came before."""
    gain, bias = normal(3, 8), normal(4, 8)
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    for shape in ((2, 5, 4, 8), (1, 3, 5, 4, 8), (1, 7, 3, 8)):
        x = normal(1, *shape).astype(mx.bfloat16)
        wide = conv.group_norm(x.astype(mx.float32), gain, bias, 4, 1e-6, silu=True)
        out = conv.group_norm(x, gain, bias, 4, 1e-6, silu=True)
        assert mx.array_equal(out, wide.astype(mx.bfloat16))
