"""Errors and processor time of single quantized layers: part of `benchmarks.quantized`."""

from __future__ import annotations

import re
import statistics
import time
from typing import Any

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip
import numpy as np
from mlx import nn

from mlx_sora.loading.model_folder import find_model
from mlx_sora.loading.networks import load_transformer
from mlx_sora.loading.quantization import named_form
from mlx_sora.models.quantized import Quantization, QuantizedLinear
from mlx_sora.request.options import FLOAT_FORMS, WIDTHS


def distance(found: mx.array, expected: mx.array) -> float:
    """Norm of the difference over that of what is expected."""
    return float((mx.linalg.norm(found - expected) / mx.linalg.norm(expected)).item())


def layer_errors(plain: nn.Module, quantized: nn.Module) -> dict[str, dict[str, float]]:
    """Error of each kind of layer: mean and largest over the blocks."""
    layers = dict(plain.named_modules())
    found: dict[str, list[float]] = {}
    for path, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLinear):
            x = mx.random.normal((256, layers[path].weight.shape[1]), key=mx.random.key(0))
            kind = re.sub(r"\.\d+\.", ".", path)
            found.setdefault(kind, []).append(distance(layer(x), layers[path](x)))
    return {
        kind: {"mean": round(statistics.mean(errors), 5), "max": round(max(errors), 5)}
        for kind, errors in found.items()
    }


def full_width() -> list[dict[str, Any]]:
    """Error and processor time of STDiT's qkv layer at 1440 tokens, by form; random numbers."""
    tokens, inputs, outputs = 1440, 1152, 3456
    x = mx.random.normal((tokens, inputs), key=mx.random.key(0))
    weight = mx.random.normal((outputs, inputs), key=mx.random.key(1)) * inputs**-0.5
    expected = x @ weight.T
    base = _processor_seconds(lambda: x @ weight.T)
    forms = {str(name): named_form(name) for name in (*WIDTHS, *FLOAT_FORMS)}
    forms |= {f"{n}, not rotated": Quantization(n) for n in (3, 4, 5, 6)}
    found = []
    for name, form in forms.items():
        layer = QuantizedLinear(inputs, outputs, bias=False, **form.to_dict())
        layer.update(form.quantize(weight, mx.float32))
        found.append(
            {
                "form": name,
                "error": distance(layer(x), expected),
                "seconds": _processor_seconds(lambda layer=layer: layer(x)),
                "float_seconds": base,
            }
        )
    return found


def _processor_seconds(work: Any) -> float:
    mx.eval(work())
    times = []
    for _ in range(5):
        start = time.process_time()
        mx.eval(work())
        times.append(time.process_time() - start)
    return statistics.median(times)


def codebooks() -> list[dict[str, Any]]:
    """Errors of weights: VQ4DiT's codebooks against affine bits, for the MLPs of the bundled model.

    A codebook has 16-bit entries of `size` weights, one for each layer. bits: with scales or, for
    layers as large as the published ones, the codebook. error: of all weights together.
    """
    network = load_transformer(find_model("shapes"), mx.float32)
    layers = [m.weight for path, m in network.named_modules() if path.endswith("mlp.fc1")]
    total = sum(float(mx.square(weight).sum().item()) for weight in layers)
    found = []
    for size, count in ((4, 256), (4, 1024), (2, 128)):
        for rotated in (False, True):
            lost = sum(_codebook_error(weight, size, count, rotated) for weight in layers)
            bits = np.log2(count) / size + 16 * size * count / (1152 * 1152) + 16 / 1152 * rotated
            name = f"{count} codes of {size} weights{', rotated' if rotated else ''}"
            found.append({"form": name, "bits": float(bits), "error": float(np.sqrt(lost / total))})
    for bits in (2, 3, 4):
        for form in (Quantization(bits), Quantization(bits, rotation=128)):
            lost = sum(
                float(mx.square(_rounded(weight, form) - weight).sum().item()) for weight in layers
            )
            error = float(np.sqrt(lost / total))
            found.append({"form": str(form), "bits": form.bits_per_weight, "error": error})
    return found


def _rounded(weight: mx.array, form: Quantization) -> mx.array:
    return form.rotate(form.dequantize(form.quantize(weight), mx.float32))


def _codebook_error(weight: mx.array, size: int, count: int, rotated: bool) -> float:
    """Squared error of k-means over groups of `size` weights; rotated: rows then scaled to one."""
    rows = np.asarray(Quantization(4, rotation=128 * rotated).rotate(weight))
    scales = np.sqrt((rows**2).mean(1, keepdims=True)) if rotated else np.ones((len(rows), 1))
    points = (rows / scales).reshape(-1, size).astype(np.float32)
    random = np.random.default_rng(0)
    codes = points[random.choice(len(points), count, replace=False)]
    for _ in range(10):
        nearest = _nearest(points, codes)
        members = np.bincount(nearest, minlength=count)
        for axis in range(size):
            sums = np.bincount(nearest, points[:, axis], minlength=count)
            codes[:, axis] = np.where(members, sums / np.maximum(members, 1), codes[:, axis])
    lost = ((points - codes[_nearest(points, codes)]).reshape(rows.shape) * scales) ** 2
    return float(lost.sum())


def _nearest(points: np.ndarray, codes: np.ndarray) -> np.ndarray:
    found: np.ndarray = ((codes**2).sum(1) - 2 * points @ codes.T).argmin(1)
    return found
