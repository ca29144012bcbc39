"""The few operations whose best form depends on the backend.

On a GPU, MLX's own fused kernels; on its CPU backend (scalar `exp`, unfused attention, full im2col
convolutions) exact rewrites of the same formulas. Both forms agree to float32 rounding.
Dimension letters: B batch, T frames, H height, W width, S tokens per frame, L text tokens,
C channels.
"""

from __future__ import annotations

import math

import mlx.core as mx


def on_gpu() -> bool:
    """True when MLX's default device is a GPU (Metal or CUDA)."""
    return bool(mx.default_device() == mx.Device(mx.gpu))


def exp(x: mx.array) -> mx.array:
    """e^x. On CPU in float32 a degree-6 polynomial on [-ln2/2, ln2/2], relative error 9e-7."""
    if on_gpu() or x.dtype != mx.float32:
        return mx.exp(x)
    t = mx.clip(x, -87.0, 88.0) * (1.0 / math.log(2.0))
    n = mx.floor(t + 0.5)
    r = (t - n) * math.log(2.0)
    p = mx.array(1.0 / 720.0)
    for c in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = p * r + c
    # 2^n written straight into the exponent bits.
    return p * mx.view((n.astype(mx.int32) + 127) * (1 << 23), mx.float32)


def silu(x: mx.array) -> mx.array:
    """x · sigmoid(x)."""
    return x * mx.sigmoid(x) if on_gpu() else x / (1.0 + exp(-x))


def gelu_tanh(x: mx.array) -> mx.array:
    """Tanh-approximated GELU: 0.5x(1 + tanh u) = x·sigmoid(2u), u = sqrt(2/pi)(x + 0.044715x³)."""
    c = -2.0 * math.sqrt(2.0 / math.pi)
    u = x * (c + (c * 0.044715) * (x * x))
    return x / (1.0 + exp(u))


def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    """softmax(scale · q kᵀ + mask) v, softmax in float32.

    q [B, heads, L, d], k and v [B, heads, M, d]; mask boolean (True = attend) or additive,
    broadcastable to [B, heads, L, M]. Returns [B, heads, L, d].
    """
    if on_gpu():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    scores = (q * scale) @ k.swapaxes(-1, -2)
    if mask is not None:
        if mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, mx.array(-1e30, scores.dtype))
        else:
            scores = scores + mask
    scores = scores.astype(mx.float32)
    weights = exp(scores - scores.max(axis=-1, keepdims=True))
    # Normalising the output instead of the weights is one pass over [L, d], not [L, M].
    return ((weights @ v) / weights.sum(axis=-1, keepdims=True)).astype(q.dtype)
