"""Forms that depend on the backend, at the sizes of Open-Sora 1.2.

A new form is a function that builds its case and a line in `FORMS`. Sizes are those of 240p, 51
frames, unless the name says otherwise: latents of 30 x 53, 405 tokens per frame, 15 frames.
Dimension letters: B batch, T frames, H height, W width, S tokens per frame, C channels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
from mlx import nn

from mlx_sora.loading.quantization import named_form
from mlx_sora.manage.machine_check import Case, Form, type_advice
from mlx_sora.models import conv, ops, stdit3, t5
from mlx_sora.models.quantized import QuantizedLinear

HEADS, HEAD, WIDTH, MLP = 16, 72, 1152, 4608
LATENT_HEIGHT, LATENT_WIDTH, FRAMES, TOKENS = 30, 53, 15, 405
TEXT_TOKENS = 300


def part(total: int, scale: float, least: int = 1) -> int:
    """Return the share `scale` of a dimension."""
    return min(total, max(least, round(total * scale)))


def normals(*shapes: Sequence[int]) -> list[mx.array]:
    """Return standard normal numbers, float32, the same ones on every machine."""
    import numpy as np

    random = np.random.default_rng(len(shapes))
    return [mx.array(random.standard_normal(shape, dtype=np.float32)) for shape in shapes]


def spatial_attention(scale: float) -> Case:
    """Attention within each frame, head size 72."""
    shape = (part(FRAMES, scale), HEADS, TOKENS, HEAD)
    return Case(partial(ops.attention, scale=HEAD**-0.5), normals(shape, shape, shape))


def temporal_attention(frames: int, scale: float) -> Case:
    """Attention along time, head size 72; MLX's fused kernel takes more than 8 queries."""
    shape = (part(TOKENS, scale), HEADS, frames, HEAD)
    return Case(partial(ops.attention, scale=HEAD**-0.5), normals(shape, shape, shape))


def cross_attention(scale: float) -> Case:
    """Attention to texts of different lengths, with a boolean mask."""
    queries = (2, part(FRAMES * TOKENS, scale, HEAD), HEADS, HEAD)
    text = (2, HEADS, TEXT_TOKENS, HEAD)
    mask = mx.arange(TEXT_TOKENS)[None] < mx.array([TEXT_TOKENS, 17])[:, None]

    def run(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
        return ops.attention(q.swapaxes(1, 2), k, v, scale=HEAD**-0.5, mask=mask)

    return Case(run, normals(queries, text, text), [mask[:, None, None, :]])


def text_attention(scale: float) -> Case:
    """Attention of T5: head size 64, biases of positions, masked padding, logits not scaled."""
    length, heads, head = part(TEXT_TOKENS, scale, 16), 64, 64
    q, k, v, bias = normals(*[(1, length, heads, head)] * 3, (1, heads, length, length))
    valid = mx.arange(length) < length - length // 3

    def run(q: mx.array, k: mx.array, v: mx.array, bias: mx.array, valid: mx.array) -> mx.array:
        bias = mx.where(valid, bias, mx.array(t5.MASKED, bias.dtype))
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return ops.attention(q, k, v, scale=1.0, mask=bias)

    return Case(run, [q / 4, k, v, 2 * bias], [valid])


def image_attention(scale: float) -> Case:
    """Attention of the VAE over one frame of 720p: one head of size 512."""
    shape = (1, 1, part(90 * 160, scale, 16), 512)
    return Case(partial(ops.attention, scale=512**-0.5), normals(shape, shape, shape))


def convolution(
    function: Callable[..., mx.array], shape: tuple[int, ...], outputs: int, scale: float
) -> Case:
    """Apply a convolution to [.., T, H, W, C], at a smaller scale to fewer frames, then rows."""
    *outer, frames, height, width, inputs = shape
    fewer = part(frames, scale, min(frames, 4))
    rows = part(height, scale * frames / fewer, 4)
    kernel = (3,) * (len(shape) - 2)
    x, weight, bias = normals(
        (*outer, fewer, rows, width, inputs), (*kernel, outputs, inputs), (outputs,)
    )
    return Case(function, [x, weight / math.sqrt(math.prod(kernel) * inputs), bias])


def product(scale: float) -> Case:
    """Multiply as the first layer of STDiT3's MLP does."""
    x, weight, bias = normals((part(FRAMES * TOKENS, scale), WIDTH), (MLP, WIDTH), (MLP,))
    return Case(lambda x, w, b: mx.addmm(b, x, w.T), [x, weight / math.sqrt(WIDTH), bias])


def quantized_product(name: int | str, rows: int, scale: float) -> Case:
    """Multiply with quantized weights; MLX has other kernels for few rows."""
    x, weight, bias = normals((part(rows, scale), WIDTH), (MLP, WIDTH), (MLP,))
    with mx.stream(mx.cpu):
        packed = named_form(name).quantize(weight / math.sqrt(WIDTH), mx.float32)
        mx.eval(packed)
    layer = QuantizedLinear(WIDTH, MLP, bias=True, **named_form(name).to_dict())
    floats = {"bias": bias, **{n: a for n, a in packed.items() if a.dtype == mx.float32}}
    codes = {n: a for n, a in packed.items() if n not in floats}

    def run(x: mx.array, *arrays: mx.array) -> mx.array:
        layer.update(dict(zip([*floats, *codes], arrays, strict=True)))
        return layer(x)

    return Case(run, [x, *floats.values()], [*codes.values()])


def rope(scale: float) -> Case:
    """Rotate by the positions of 408 frames."""
    return Case(stdit3.Rope(HEAD), normals((part(64, scale), HEADS, 120, HEAD)))


def time_embedding(scale: float) -> Case:
    """Embed flow times, with angles up to 1000."""
    times = mx.arange(part(1000, scale, 8)) * 1000.0 / part(1000, scale, 8)
    return Case(lambda: stdit3.timestep_embedding(times), [])


def layer_norm(scale: float) -> Case:
    """Normalize and modulate the residual stream, which is always float32."""
    norm = nn.LayerNorm(WIDTH, eps=1e-6, affine=False)
    x, shift, size = normals((part(FRAMES * TOKENS, scale), WIDTH), (WIDTH,), (WIDTH,))
    return Case(lambda x, b, g: ops.modulate(norm(x), b, g), [4 * x + 2, shift, size])


def rms_norm(channels: int, rows: int, scale: float) -> Case:
    """Normalize queries and keys of STDiT3, or the text states of T5."""
    x, weight = normals((part(rows, scale), channels), (channels,))
    return Case(lambda x, w: mx.fast.rms_norm(x, w, 1e-6), [10 * x, 1 + weight / 4])


def group_norm(silu: bool, scale: float) -> Case:
    """Normalize a frame of the VAE's last level, whose mean is far from 0."""
    shape = (1, part(8 * LATENT_HEIGHT, scale), 8 * LATENT_WIDTH, 128)
    x, weight, bias = normals(shape, (128,), (128,))

    def run(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        return conv.group_norm(x, weight, bias, groups=32, eps=1e-6, silu=silu)

    return Case(run, [x + 2, 1 + weight / 4, bias])


def activation(function: Callable[[mx.array], mx.array], channels: int, scale: float) -> Case:
    """Apply GELU or SiLU to small and large values."""
    return Case(function, [4 * normals((part(2000, scale), channels))[0]])


def _product_advice(dtype: mx.Dtype) -> str:
    """Return advice for products: TF32 has 10 bits of mantissa."""
    if dtype == mx.float32 and os.environ.get("MLX_ENABLE_TF32", "1") != "0":
        return "Run with MLX_ENABLE_TF32=0 in the environment."
    return type_advice(dtype)


def _convolution_advice(dtype: mx.Dtype) -> str:
    if dtype == mx.float32 and os.environ.get("MLX_CONV_WINOGRAD", "1") != "0":
        return "Run with MLX_ENABLE_TF32=0 and MLX_CONV_WINOGRAD=0 in the environment."
    return type_advice(dtype, "--vae-dtype")


_vae_advice = partial(type_advice, option="--vae-dtype")


def _attention(
    name: str, make: Callable[[float], Case], gflop: float, gigabytes: float, half: float = 8
) -> Form:
    return Form(f"attention {name}", make, gflop, gigabytes, 60, half, advice=_product_advice)


def _convolution(
    name: str, function: Callable[..., mx.array], shape: tuple[int, ...], outputs: int
) -> Form:
    taps = 3 ** (len(shape) - 2)
    values = math.prod(shape)
    return Form(
        f"convolution {name}",
        partial(convolution, function, shape, outputs),
        gflop=2e-9 * values * taps * outputs,
        gigabytes=4e-9 * values * (taps + 2),  # as a matrix of windows
        float32=600,
        half=4,
        advice=_convolution_advice,
    )


_LEVELS = [(LATENT_HEIGHT * n, LATENT_WIDTH * n) for n in (1, 2, 4, 8)]

#: Winograd on Metal takes 3x3 kernels with 32 n channels, 256 or more in all, and 4096 positions.
CONVOLUTIONS = (
    _convolution("512 to 512, 2-D", conv.conv2d, (1, *_LEVELS[1], 512), 512),
    _convolution("128 to 128, 2-D", conv.conv2d, (1, *_LEVELS[3], 128), 128),
    _convolution("4 to 512, 2-D", conv.conv2d, (4, *_LEVELS[0], 4), 512),
    _convolution("128 to 3, 2-D", conv.conv2d, (1, *_LEVELS[3], 128), 3),
    _convolution("downsampling 128", conv.downsample2d, (1, *_LEVELS[3], 128), 128),
    _convolution("upsampling 512", conv.upsample_conv2d, (1, *_LEVELS[0], 512), 512),
    _convolution("256 to 256, 3-D", conv.causal_conv3d, (1, 20, *_LEVELS[0], 256), 256),
    _convolution("512 to 512, 3-D, one frame", conv.causal_conv3d, (1, 1, *_LEVELS[0], 512), 512),
    _convolution("4 to 512, 3-D", conv.causal_conv3d, (1, 5, *_LEVELS[0], 4), 512),
    _convolution(
        "128 to 128, 3-D, half the frames",
        partial(conv.causal_conv3d, time_stride=2),
        (1, 20, *_LEVELS[0], 128),
        128,
    ),
)

# Errors in epsilons of the type. Measured with MLX's kernels for CPUs, in half precision: products
# 0.4, convolutions 1.3, attention 3 (T5's 6), quantized products 4, norms 0.8, rope 0.7,
# activations 0.3; in float32: 14 at most. Computed for Metal in float32: Winograd's transforms 150,
# rope 1000 (fast trigonometry, 2^-13). What is to be found is larger: with TF32 products and direct
# convolutions have 2700, and Winograd 130,000; Winograd in half precision has 21.
FORMS = (
    Form("product", product, 64, 0.3, 60, 2, advice=_product_advice),
    _attention("within frames (head 72)", spatial_attention, 11, 0.3),
    _attention("along 15 frames (head 72)", partial(temporal_attention, 15), 0.5, 0.1),
    _attention("along 5 frames (head 72)", partial(temporal_attention, 5), 0.1, 0.1),
    _attention("to text (head 72, mask)", cross_attention, 17, 0.6),
    _attention("of T5 (head 64, biases)", text_attention, 1.5, 0.2, half=20),
    _attention("of the VAE (head 512)", image_attention, 424, 2.5),
    *CONVOLUTIONS,
    Form("quantized product, 4 bits", partial(quantized_product, 4, 300), 60, 0.1, 60, 10),
    Form("quantized product, 8 bits", partial(quantized_product, 8, 300), 60, 0.1, 60, 10),
    Form("quantized product, 6 bits", partial(quantized_product, 6, 300), 60, 0.1, 60, 10),
    Form("quantized product, mxfp4", partial(quantized_product, "mxfp4", 300), 60, 0.1, 60, 10),
    Form("quantized product, 8 bits, 3 rows", partial(quantized_product, 8, 3), 1, 0.1, 60, 10),
    Form("rope", rope, 0.5, 0.1, 4000, 2),
    Form("embedding of times", time_embedding, 0.1, 0.1, 4000, 2, (mx.float32,)),
    Form("layer norm", layer_norm, 2, 0.2, 20, 2, (mx.float32,)),
    Form("RMS norm of queries", partial(rms_norm, HEAD, 97200), 2, 0.2, 20, 2),
    Form("RMS norm of text", partial(rms_norm, 4096, TEXT_TOKENS), 0.5, 0.1, 20, 2),
    Form("group norm", partial(group_norm, False), 5, 0.3, 100, 2, advice=_vae_advice),
    Form("group norm, SiLU", partial(group_norm, True), 5, 0.3, 100, 2, advice=_vae_advice),
    Form("SiLU", partial(activation, ops.silu, WIDTH), 5, 0.1, 50, 1.5),
    Form("GELU", partial(activation, ops.gelu_tanh, MLP), 20, 0.2, 50, 1.5),
)
