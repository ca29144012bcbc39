"""The operations agree with their formulas, in pieces or whole."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_sora.models import ops
from tests.helpers.tolerance import rounding

cpu_only = pytest.mark.skipif(ops.on_gpu(), reason="pieces are the CPU's way")


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def plain_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None
) -> np.ndarray:
    """softmax(scale · q kᵀ + mask) v in float64."""
    q, k, v = (np.array(a, dtype=np.float64) for a in (q, k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    if mask is not None:
        m = np.array(mask)
        scores = np.where(m, scores, -np.inf) if m.dtype == bool else scores + m
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


MASKS = {
    "none": None,
    "per sample": (mx.arange(7) < mx.array([[7], [3], [1]]))[:, None, None, :],
    "shared bias": normal(1, 2, 150, 7, seed=4),
    "bias of each sample": normal(3, 2, 150, 7, seed=5),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("piece", [1, 150 * 2 * 7 * 4, 2 * 150 * 2 * 7 * 4, 1 << 30])
def test_attention_in_pieces(
    monkeypatch: pytest.MonkeyPatch, mask: mx.array | None, piece: int
) -> None:
    """Pieces of 64 queries, of one sample, of two samples, and all at once: the same result."""
    monkeypatch.setattr(ops, "SLICE_BYTES", piece)
    q, k, v = normal(3, 2, 150, 8), normal(3, 2, 7, 8, seed=1), normal(3, 2, 7, 8, seed=2)
    out = ops.attention(q, k, v, 0.3, mask)
    np.testing.assert_allclose(
        np.array(out), plain_attention(q, k, v, 0.3, mask), atol=rounding(2e-6)
    )


@cpu_only
def test_attention_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "SLICE_BYTES", 1 << 20)
    q = normal(4, 4, 768, 8)
    mx.eval(q)
    logits = 4 * 4 * 768 * 768 * 4
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(ops.attention(q, q, q, 1.0))
    assert logits == 36 * ops.SLICE_BYTES
    assert mx.get_peak_memory() - before < 20 * ops.SLICE_BYTES


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        ("DISPATCH_FLOPS", [(1, 50)] * 9),
        ("LOGITS_BYTES", [(1, 50)] * 9),
        ("DISPATCH_FLOPS", [(2, 150), (1, 150)]),
        ("LOGITS_BYTES", [(2, 150), (1, 150)]),
    ],
)
def test_attention_of_gpus_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
    mask: mx.array | None,
    limit: str,
    sizes: list[tuple[int, int]],
) -> None:
    """A kernel does 50 queries, or two samples: the same result."""
    queries = sizes[0][0] * sizes[0][1]
    most = queries * {"DISPATCH_FLOPS": 4 * 2 * 7 * 8, "LOGITS_BYTES": 4 * 2 * 7}[limit]
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    monkeypatch.setattr(ops, "MIN_QUERIES", 1)
    monkeypatch.setattr(ops, "MAX_FUSED_HEAD", 7)
    monkeypatch.setattr(ops, limit, most)
    seen: list[tuple[int, int]] = []
    whole = mx.fast.scaled_dot_product_attention

    def watched(q: mx.array, *rest: mx.array, **options: Any) -> mx.array:
        seen.append((q.shape[0], q.shape[2]))
        return whole(q, *rest, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    q, k, v = normal(3, 2, 150, 8), normal(3, 2, 7, 8, seed=1), normal(3, 2, 7, 8, seed=2)
    out = ops.attention(q, k, v, 0.3, mask)
    assert seen == sizes
    np.testing.assert_allclose(np.array(out), plain_attention(q, k, v, 0.3, mask), atol=2e-6)


def test_fused_attention_of_gpus_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that never exist need no limit; cuDNN fuses half precision only."""
    q = normal(1, 1, 200, 8)
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    monkeypatch.setattr(ops, "LOGITS_BYTES", 1)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert ops._max_queries(q, q) > 200
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    assert ops._max_queries(q, q) == 0
    half = q.astype(mx.float16)
    assert ops._max_queries(half, half) > 200


@pytest.mark.parametrize("rows", [3, 4, 30])
def test_linear_of_gpus_in_pieces(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Rows are cut so that one product does no more than the limit: 3 of 10, or all."""
    layer, x, seen = nn.Linear(4, 6), normal(2, 5, 4), []

    class Watched(nn.Linear):
        def __call__(self, x: mx.array) -> mx.array:
            seen.append(x.shape[:-1])
            out: mx.array = layer(x)
            return out

    assert mx.array_equal(ops.linear(layer, x), layer(x))
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    monkeypatch.setattr(ops, "MIN_ROWS", 1)
    monkeypatch.setattr(ops, "DISPATCH_FLOPS", 2 * 4 * 6 * rows)
    out = ops.linear(Watched(4, 6), x)
    assert seen == {3: [(3,), (3,), (3,), (1,)], 4: [(4,), (4,), (2,)], 30: [(2, 5)]}[rows]
    np.testing.assert_allclose(np.array(out), np.array(layer(x)), atol=1e-6)


@pytest.mark.parametrize("device", ["SLICE_BYTES", "MLP_BYTES"])
@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_in_pieces(monkeypatch: pytest.MonkeyPatch, piece: int, device: str) -> None:
    monkeypatch.setattr(ops, "on_gpu", lambda: device == "MLP_BYTES")
    monkeypatch.setattr(ops, "MIN_ROWS", 1)
    monkeypatch.setattr(ops, device, piece)
    x, w = normal(2, 5, 3, 4), normal(4, 6, seed=1)
    out = ops.apply_in_slices(lambda rows: mx.tanh(rows @ w), x, row_bytes=24)
    np.testing.assert_allclose(
        np.array(out), np.tanh(np.array(x) @ np.array(w)), atol=rounding(1e-6)
    )


def test_pieces_have_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients whether attention ran whole or in pieces."""
    q, k, v = normal(2, 2, 130, 4), normal(2, 2, 5, 4, seed=1), normal(2, 2, 5, 4, seed=2)

    def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        out = ops.attention(q, k, v, 0.5)
        return (ops.apply_in_slices(mx.tanh, out, row_bytes=16) ** 2).sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2))
    whole = gradient(q, k, v)
    monkeypatch.setattr(ops, "SLICE_BYTES", 1)
    for a, b in zip(gradient(q, k, v), whole, strict=True):
        assert float(mx.abs(b).max()) > 0
        np.testing.assert_allclose(
            np.array(a), np.array(b), rtol=rounding(1e-4), atol=rounding(1e-5)
        )


def test_exp() -> None:
    for limit, tolerance in ((8, 1.2e-6), (80, 5e-6)):
        x = mx.linspace(-limit, limit, 4001)
        expected = np.exp(np.array(x, dtype=np.float64))
        np.testing.assert_allclose(np.array(ops.exp(x)), expected, rtol=rounding(tolerance))
    assert float(ops.exp(mx.array(-200.0))) < 1e-37
    assert float(ops.exp(mx.array(0.0))) == 1.0


def test_exp_is_its_own_derivative() -> None:
    x = mx.linspace(-20, 20, 401)
    slope = mx.grad(lambda a: ops.exp(a).sum())(x)
    np.testing.assert_allclose(
        np.array(slope), np.exp(np.array(x, np.float64)), rtol=rounding(1e-5)
    )


def test_activations() -> None:
    x = mx.linspace(-30, 30, 2001)
    d = np.array(x, dtype=np.float64)
    u = math.sqrt(2 / math.pi) * (d + 0.044715 * d**3)
    np.testing.assert_allclose(
        np.array(ops.gelu_tanh(x)), 0.5 * d * (1 + np.tanh(u)), atol=rounding(4e-6)
    )
    np.testing.assert_allclose(np.array(ops.silu(x)), d / (1 + np.exp(-d)), atol=rounding(4e-6))
