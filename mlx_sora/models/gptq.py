"""Error compensation of quantized weights (GPTQ, arXiv 2210.17323).

Columns are rounded one after the other. Each takes over, of the errors before it, what its inputs
have in common with theirs, so that the error of the layer's output is least for the inputs that
were measured. The form of the weights stays the same, and a run costs what it costs without.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_sora.models.precision import ROUNDING
from mlx_sora.models.quantized import WORD_BITS, Quantization

#: Share of the mean square of the inputs that is added to each, as if it had noise of its own.
DAMPING = 0.01

#: Ranges that are tried for the codes of a group, as shares of the range of its weights: the
#: outermost may be cut off, so that the others get a finer scale.
RANGES = tuple(1 - n / 20 for n in range(7))


def compensate(
    weight: mx.array, moments: mx.array, form: Quantization, dtype: mx.Dtype | None = None
) -> dict[str, mx.array]:
    """Quantize the weight [outputs, inputs] of a layer as `form.quantize` does, with compensation.

    moments: sum of xᵀ x [inputs, inputs] over the inputs x of the layer. form: affine. dtype: of
    scales and biases; None selects as `form.quantize` does.
    """
    kind = form.quantize(weight, dtype)["scales"].dtype
    exact = np.asarray(form.rotate(weight.astype(ROUNDING)), np.float64)
    shares, costs = _factorize(form.rotate(form.rotate(moments).T))
    most, errors = 2**form.bits - 1, np.zeros_like(exact)
    codes = np.zeros(exact.shape, np.uint8)
    scales, biases = np.zeros((2, len(exact), exact.shape[1] // form.group_size))
    for group in range(scales.shape[1]):
        start = group * form.group_size
        own = slice(start, start + form.group_size)
        wanted = exact[:, own] + errors[:, :start] @ shares[:start, own]
        scale, bias = _choose_range(wanted, costs[own], most, kind)
        for column in range(start, own.stop):
            shift = errors[:, start:column] @ shares[start:column, column]
            code = _codes(wanted[:, column - start] + shift, scale, bias, most)
            errors[:, column] = exact[:, column] - (code * scale + bias)
            codes[:, column] = code
        scales[:, group], biases[:, group] = scale, bias
    floats = (mx.array(each.astype(np.float32)).astype(kind) for each in (scales, biases))
    return dict(zip(form.parameters, (pack(codes, form.bits), *floats), strict=True))


def pack(codes: np.ndarray, bits: int) -> mx.array:
    """Pack codes uint8 [rows, n] as MLX does: `bits` of each, the lowest first, one after another.

    Returns uint32 [rows, n · bits / 32].
    """
    each = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(each.reshape(len(codes), -1), axis=-1, bitorder="little")
    assert packed.shape[1] % (WORD_BITS // 8) == 0
    return mx.array(packed.view("<u4"))


def _factorize(moments: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Return L and the diagonal of D of the moments L D Lᵀ, with L unit upper triangular.

    Column k takes over L[i, k] of the error of each column i < k; what it then loses itself costs
    D[k] (QuIP, arXiv 2307.13304, shows that this is GPTQ).
    """
    damped = np.asarray(moments, np.float64)[::-1, ::-1].copy()
    damped[np.diag_indices_from(damped)] += DAMPING * np.diag(damped).mean() or 1.0
    root = np.linalg.cholesky(damped)[::-1, ::-1]
    diagonal = np.diag(root).copy()
    root /= diagonal
    return root, diagonal**2


def _choose_range(
    values: np.ndarray, costs: np.ndarray, most: int, dtype: mx.Dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and bias of each row of a group: of RANGES of its values, the one of least cost.

    values: [rows, group size]. costs: of the squared error of each column. dtype: of the results.
    """
    low, high = values.min(axis=1), values.max(axis=1)
    best, least = np.zeros((2, len(values))), np.full(len(values), np.inf)
    for share in RANGES:
        cut = (1 - share) / 2 * (high - low)
        scale, bias = _round(share * (high - low) / most, dtype), _round(low + cut, dtype)
        scale[scale == 0] = 1  # all weights are equal: their code is 0
        codes = _codes(values, scale[:, None], bias[:, None], most)
        cost = np.square(codes * scale[:, None] + bias[:, None] - values) @ costs
        better = cost < least
        best[:, better], least[better] = np.stack((scale, bias))[:, better], cost[better]
    return best[0], best[1]


def _codes(values: np.ndarray, scale: np.ndarray, bias: np.ndarray, most: int) -> np.ndarray:
    codes: np.ndarray = np.rint((values - bias) / scale).clip(0, most)
    return codes


def _round(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    rounded = mx.array(values.astype(np.float32)).astype(dtype).astype(ROUNDING)
    return np.array(rounded, np.float64)
