"""Operations whose best form depends on the backend.

GPUs use MLX's own fused kernels. MLX's CPU backend has scalar `exp`, unfused attention and full
im2col convolutions, so there these are exact rewrites of the same formulas. Both forms agree to
float32 rounding. Dimension letters: B batch, T frames, H height, W width, S tokens per frame, L
text tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import mlx.core as mx
from mlx import nn

from mlx_sora.models import precision
from mlx_sora.models.layers import compiled

#: On CPU, chains of elementwise operations run on about this many bytes at a time. The slices stay
#: in cache, and the transient memory does not grow with the size of the video.
SLICE_BYTES = 8 << 20

#: Smallest slices of queries and of rows: with fewer, matrix products are inefficient.
MIN_QUERIES = 64
MIN_ROWS = 1024

#: On GPUs, one product, attention or convolution does about this many floating-point operations at
#: most: 0.2 to 0.4 s on an M1. macOS ends what keeps a GPU from drawing the screen for seconds, and
#: a kernel is not divided.
DISPATCH_FLOPS = 500_000_000_000

#: On GPUs, logits of attention that MLX does not fuse are at most this large. The VAE's single head
#: over a frame of 720p has 0.8 GB of them.
LOGITS_BYTES = 64 << 20

#: Largest head size whose attention MLX fuses on every GPU: no logits in memory.
MAX_FUSED_HEAD = 128

#: On GPUs, the hidden values of an MLP are at most this large. Those of a long clip have gigabytes.
MLP_BYTES = 256 << 20

#: On GPUs, an evaluation of the transformer with more tokens is computed block by block, so that
#: its commands are not all queued at once, and its progress shows.
LARGE_PASS_TOKENS = 100_000


#: Forms that `use_forms` has chosen for the block that runs; None: those of the default device.
_gpu_forms: ContextVar[bool | None] = ContextVar("gpu_forms", default=None)


def on_gpu() -> bool:
    """Return True if MLX's default device is a GPU (Metal or CUDA)."""
    chosen = _gpu_forms.get()
    return bool(mx.default_device() == mx.Device(mx.gpu)) if chosen is None else chosen


@contextmanager
def use_forms(gpu: bool) -> Iterator[None]:
    """Use the forms of GPUs, or of CPUs, on any device inside the block, to compare both."""
    token = _gpu_forms.set(gpu)
    try:
        yield
    finally:
        _gpu_forms.reset(token)


#: 2^r on [-1/2, 1/2], r^0 to r^5: minimax under the constraint that e^0 is exactly 1; error 1e-7.
_EXP2 = (1.0, 0.693146978, 0.240222421, 0.0555073375, 0.00967151313, 0.00132647271)

_LOG2_E = 1.0 / math.log(2.0)


def exp(x: mx.array) -> mx.array:
    """Return e^x. On CPU, float32 uses a degree-5 polynomial times a power of two.

    MLX's own `exp` is scalar there. Relative error 6e-7 for |x| < 8 and 4e-6 at ±80, as mx.exp. x
    is clipped to ±86. Differentiable.
    """
    if on_gpu() or x.dtype != mx.float32:
        return mx.exp(x)
    return _exp2(*_exp2_parts(_exp_input(x)))


# Compiled chains of elementwise operations make few passes over memory. MLX fuses at most about ten
# operations and no `view`, hence the parts. Without a C++ compiler MLX runs them one by one. On CPU
# the input is float32; on GPUs it is any type, and the computation is float32.


@compiled
def _exp_input(x: mx.array) -> mx.array:
    return mx.clip(x * _LOG2_E, -125.0, 125.0)


@compiled
def _split_exponent(t: mx.array, same: mx.array) -> tuple[mx.array, mx.array]:
    """Return t minus its nearest integer n, and the bits of 2^n. same: t without a gradient."""
    exponent = (same + 126.5).astype(mx.int32)
    return t - (exponent.astype(mx.float32) - 126.0), (exponent + 1) << 23


def _exp2_parts(t: mx.array) -> tuple[mx.array, mx.array]:
    """Return r in [-1/2, 1/2] and p with 2^t = 2^r · p for t in [-125, 125]; r has the gradient."""
    r, bits = _split_exponent(t, mx.stop_gradient(t))
    return r, mx.view(bits, mx.float32)


def _polynomial(r: mx.array) -> mx.array:
    """Return 2^r. Terms are added in pairs so that fewer operations wait for each other."""
    a, b, c, d, e, f = _EXP2
    square = r * r
    return ((f * r + e) * square + (d * r + c)) * square + (b * r + a)


@compiled
def _exp2(r: mx.array, power: mx.array) -> mx.array:
    return _polynomial(r) * power


@compiled
def _times_sigmoid(x: mx.array, r: mx.array, power: mx.array) -> mx.array:
    """Return x · sigmoid(-log(2^r · power))."""
    return x / (1.0 + _polynomial(r) * power)


@compiled
def _softmax_input(x: mx.array, top: mx.array) -> mx.array:
    return mx.maximum((x - top) * _LOG2_E, -125.0)


@compiled
def _silu_input(x: mx.array) -> mx.array:
    return mx.clip(x * -_LOG2_E, -125.0, 125.0)


@compiled
def _gelu_input(x: mx.array) -> mx.array:
    c = -2.0 * math.sqrt(2.0 / math.pi) * _LOG2_E
    return mx.clip(x * (c + (c * 0.044715) * (x * x)), -125.0, 125.0)


@partial(compiled, shapeless=True)
def _silu_gpu(x: mx.array) -> mx.array:
    wide = x.astype(precision.ACTIVATION)
    return (wide * mx.sigmoid(wide)).astype(x.dtype)


@partial(compiled, shapeless=True)
def _gelu_tanh_gpu(x: mx.array) -> mx.array:
    wide = x.astype(precision.ACTIVATION)
    c = 2.0 * math.sqrt(2.0 / math.pi)
    u = wide * (c + (c * 0.044715) * (wide * wide))
    return (wide * mx.sigmoid(u)).astype(x.dtype)


@partial(compiled, shapeless=True)
def modulate(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """Return x (1 + scale) + shift."""
    return x * (1 + scale) + shift


@partial(compiled, shapeless=True)
def add_gated(x: mx.array, gate: mx.array, y: mx.array) -> mx.array:
    """Return x + gate · y, in their promoted type."""
    return x + gate * y


def silu(x: mx.array) -> mx.array:
    """Return x · sigmoid(x)."""
    if on_gpu():
        return _silu_gpu(x)
    return apply_in_slices(_silu_rows, x, row_bytes=16 * x.shape[-1])


def _silu_rows(x: mx.array) -> mx.array:
    wide = x.astype(precision.ACTIVATION)
    return _times_sigmoid(wide, *_exp2_parts(_silu_input(wide))).astype(x.dtype)


def hadamard(x: mx.array, size: int, stream: mx.Stream | None = None) -> mx.array:
    """Multiply the last axis by a Hadamard matrix per block of `size`, scaled to be orthogonal.

    size: a power of two that divides the axis. The matrix is its own inverse.
    """
    blocks = x.reshape(-1, size, stream=stream)
    if on_gpu():
        return mx.hadamard_transform(blocks, stream=stream).reshape(x.shape, stream=stream)
    # A product is three times faster on CPUs than MLX's scalar butterflies.
    matrix = mx.hadamard_transform(mx.eye(size, stream=stream), stream=stream)
    out = mx.matmul(blocks, matrix, stream=stream).astype(x.dtype, stream=stream)
    return out.reshape(x.shape, stream=stream)


def gelu_tanh(x: mx.array) -> mx.array:
    """Return the tanh-approximated GELU.

    0.5x(1 + tanh u) = x·sigmoid(2u) with u = sqrt(2/pi)(x + 0.044715x³).
    """
    if on_gpu():
        return _gelu_tanh_gpu(x)
    wide = x.astype(precision.ACTIVATION)
    return _times_sigmoid(wide, *_exp2_parts(_gelu_input(wide))).astype(x.dtype)


def apply_in_slices(
    function: Callable[[mx.array], mx.array], x: mx.array, row_bytes: int
) -> mx.array:
    """Return function(x) for a function that maps each row of x [..., C] to a row [..., C_out].

    On CPU it runs on SLICE_BYTES at a time, on GPUs on MLP_BYTES. row_bytes: memory that `function`
    needs for one row.
    """
    limit = MLP_BYTES if on_gpu() else SLICE_BYTES
    return _apply_to_rows(function, x, limit // row_bytes)


def is_large_pass(x: mx.array) -> bool:
    """Return True if a transformer has to compute tokens x [B, T, S, C] block by block."""
    return on_gpu() and math.prod(x.shape[:-1]) > LARGE_PASS_TOKENS


def linear(layer: nn.Module, x: mx.array) -> mx.array:
    """Return layer(x) of a linear layer. On GPUs one product does DISPATCH_FLOPS at most."""
    if not on_gpu():
        return layer(x)  # type: ignore[no-any-return]
    return _apply_to_rows(layer, x, DISPATCH_FLOPS // (2 * x.shape[-1] * layer.weight.shape[0]))


def _apply_to_rows(function: Callable[[mx.array], mx.array], x: mx.array, most: int) -> mx.array:
    """Return function(x) [..., C_out] for x [..., C], computed on about `most` rows at a time."""
    count = math.prod(x.shape[:-1])
    rows = slice_size(count, max(MIN_ROWS, most))
    if count <= rows:
        return function(x)
    flat = x.reshape(count, x.shape[-1])
    done: list[mx.array] = []
    for start in range(0, count, rows):
        done.append(function(run_after(done, flat[start : start + rows])))
    return mx.concatenate(done).reshape(*x.shape[:-1], -1)


def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    """Return softmax(scale · q kᵀ + mask) v, [B, heads, L, d], with the softmax in float32.

    Where MLX does not fuse attention on a GPU (heads above MAX_FUSED_HEAD, 8 queries or fewer), it
    rounds logits and weights to the type of q.

    Args:
        q: [B, heads, L, d].
        k, v: [B, heads, M, d].
        mask: boolean (True = attend) or additive; four axes that broadcast to [B, heads, L, M].
    """
    batch, _, length, _ = q.shape
    attend = _attend_fused if on_gpu() else _attend
    most = _max_queries(q, k)
    if batch * length <= most:
        return attend(q, k, v, scale, mask)
    samples = max(1, most // length)
    queries = slice_size(length, max(MIN_QUERIES, most))
    done: list[mx.array] = []
    for b in range(0, batch, samples):
        some = slice(b, b + samples)
        row: list[mx.array] = []
        for i in range(0, length, queries):
            part = run_after(row or done, q[some, :, i : i + queries])
            row.append(attend(part, k[some], v[some], scale, _slice_mask(mask, some, i, queries)))
        done.append(row[0] if len(row) == 1 else mx.concatenate(row, axis=2))
    return mx.concatenate(done)


def _max_queries(q: mx.array, k: mx.array) -> int:
    """Return the queries to attend at a time, over all samples."""
    _, heads, keys, size = k.shape
    if not on_gpu():
        return SLICE_BYTES // (4 * heads * keys)
    most = DISPATCH_FLOPS // (4 * heads * keys * size)
    return most if _is_fused(q) else min(most, LOGITS_BYTES // (q.dtype.size * heads * keys))


def _is_fused(q: mx.array) -> bool:
    """Return True if MLX's GPU kernel attends without logits in memory; cuDNN's is for halves."""
    return q.shape[-1] <= MAX_FUSED_HEAD and not (q.dtype == mx.float32 and mx.cuda.is_available())


def slice_size(total: int, most: int) -> int:
    """Return the size of equal slices of `total`, of `most` at the most."""
    return -(-total // -(-total // most))


def run_after(done: list[mx.array], x: mx.array) -> mx.array:
    """Return x, computed only after the last of `done`, so that slices do not pile up in memory."""
    return mx.depends(x, done[-1]) if done else x


def _slice_mask(mask: mx.array | None, samples: slice, start: int, queries: int) -> mx.array | None:
    if mask is None:
        return None
    if mask.shape[0] > 1:
        mask = mask[samples]
    return mask[:, :, start : start + queries] if mask.shape[2] > 1 else mask


def _attend_fused(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None
) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def _attend(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    scores = (q * scale) @ k.swapaxes(-1, -2)
    if mask is not None:
        if mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, mx.array(-1e30, scores.dtype))
        else:
            scores = scores + mask
    scores = scores.astype(precision.STATISTICS)
    weights = _exp2(*_exp2_parts(_softmax_input(scores, scores.max(axis=-1, keepdims=True))))
    # Normalising the output instead of the weights is one pass over [L, d], not [L, M].
    return ((weights @ v) / weights.sum(axis=-1, keepdims=True)).astype(q.dtype)
