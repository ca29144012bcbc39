"""Affine quantisation of a network's linear layers: which they are, and how their weights change.

Quantised are the linear layers inside T5's and STDiT's blocks, nothing else: embedders, norms,
time modulation, final layer, scale-shift tables and the VAE keep their values. config.json says so
as in other MLX models: {"quantization": {"bits": 8, "group_size": 64}}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import PARTS, ModelFolder
from mlx_sora.loading.safetensors import PACKED, TensorInfo, load_tensors
from mlx_sora.models.config import FIX
from mlx_sora.models.key_map import Shape
from mlx_sora.models.quantized import WORD_BITS, QuantizedLinear

#: Where config.json tells of it.
CONFIG_KEY = "quantization"

BITS = (4, 8)
GROUP_SIZE = 64

#: Start of the parameter paths of a network's blocks, and the block's number.
BLOCK_PATH = re.compile(r"(?:encoder\.block|spatial_blocks|temporal_blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Quantization:
    """bits of a weight's code; group_size: weights in a row that share scale and bias."""

    bits: int
    group_size: int = GROUP_SIZE

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Quantization | None:
        """What a config.json says, None for a network that is not quantised.

        Raises WeightsError for a kind that this package does not write.
        """
        if config.get(CONFIG_KEY) is None:
            return None
        values = config[CONFIG_KEY]
        for bits in BITS:
            if values == cls(bits).to_dict():
                return cls(bits)
        raise WeightsError(f"{CONFIG_KEY} cannot be {values!r} in a model's config.json.", FIX)

    def to_dict(self) -> dict[str, int]:
        """For config.json."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}"

    def packed_shapes(self, shape: Shape) -> dict[str, Shape]:
        """Shapes of what the weight [outputs, inputs] of a layer becomes, by parameter name."""
        outputs, inputs = shape
        groups = (outputs, inputs // self.group_size)
        packed = (outputs, inputs * self.bits // WORD_BITS)
        return {"weight": packed, "scales": groups, "biases": groups}

    def quantize(
        self, weight: mx.array, dtype: mx.Dtype | None = None, stream: mx.Stream | None = None
    ) -> dict[str, mx.array]:
        """The weight [outputs, inputs] of a layer as arrays by parameter name.

        dtype: of scales and biases; None is the 16-bit type that holds these scales best: float16
        is eight times finer, but not for the smallest numbers. stream: where the work is done.
        """
        packed, scales, biases = mx.quantize(
            weight.astype(mx.float32, stream=stream),
            group_size=self.group_size,
            bits=self.bits,
            stream=stream,
        )
        if dtype is None:
            dtype = min(
                (mx.float16, mx.bfloat16), key=lambda kind: _rounding_error(scales, biases, kind)
            )
        floats = {"scales": scales, "biases": biases}
        return {"weight": packed} | {
            name: value.astype(dtype, stream=stream) for name, value in floats.items()
        }


def _rounding_error(scales: mx.array, biases: mx.array, kind: mx.Dtype) -> float:
    """Squared error that storing scales and biases in `kind` adds to the largest codes."""
    error = scales.astype(kind).astype(mx.float32) - scales
    shift = biases.astype(kind).astype(mx.float32) - biases
    total: mx.array = (mx.square(255 * error) + mx.square(shift)).sum()
    return float(total.item())  # type: ignore[arg-type]


def quantizable_linears(network: nn.Module, quantization: Quantization) -> dict[str, nn.Linear]:
    """The layers of `network` that are to be quantised, by path.

    Those whose inputs do not divide into whole groups are left out (STDiT3-3B has such).
    """
    return {
        path: layer
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
        and BLOCK_PATH.match(path)
        and layer.weight.shape[1] % quantization.group_size == 0
    }


def insert_quantized_layers(network: nn.Module, quantization: Quantization | None) -> None:
    """Replace layers of an unfilled `network` by quantised ones."""
    if quantization is None:
        return
    replaced = []
    for path, layer in quantizable_linears(network, quantization).items():
        outputs, inputs = layer.weight.shape
        new = QuantizedLinear(inputs, outputs, bias="bias" in layer, **quantization.to_dict())
        replaced.append((path, new))
    network.update_modules(tree_unflatten(replaced))


def dense_bytes(network: nn.Module, dtype: mx.Dtype) -> dict[str, int]:
    """Bytes of each quantised layer's weights once dequantised to `dtype`, by path."""
    return {
        path: layer.dense_size * dtype.size
        for path, layer in network.named_modules()
        if isinstance(layer, QuantizedLinear)
    }


def count_parameters(checkpoint: Checkpoint, quantization: Quantization | None) -> int:
    """Numbers that the tensors stand for: a packed word for several, scales and biases for none."""
    total = checkpoint.num_parameters
    if quantization is None:
        return total
    words = sum(prod(i.shape) for i in checkpoint.tensors.values() if i.dtype == PACKED)
    codes = words * WORD_BITS // quantization.bits
    return total - words + codes - 2 * codes // quantization.group_size


@dataclass(frozen=True)
class QuantizingReader:
    """A Reader for which every tensor of `dense` comes quantised, as three.

    dense: weights by key, as they are stored. One after the other is evaluated, so that only one is
    in memory as it was.
    """

    quantization: Quantization
    weights: Mapping[str, TensorInfo]

    def __call__(
        self, file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None = None
    ) -> dict[str, mx.array]:
        weights = {key: self.weights[key] for key in tensors if key in self.weights}
        made = {name for key in weights for name in _packed_names(key)}
        others = {key: info for key, info in tensors.items() if key not in made}
        arrays = load_tensors(file, weights | others, stream)
        for key in weights:
            parts = self.quantization.quantize(arrays.pop(key), mx.float32, stream)
            mx.eval(parts)
            arrays |= dict(zip(_packed_names(key), parts.values(), strict=True))
        return arrays


def quantize_on_load(
    checkpoint: Checkpoint, network: nn.Module, quantization: Quantization
) -> Checkpoint:
    """`checkpoint` as if it were quantised for `network`, which is not prepared yet.

    What it holds in other shapes stays as it is, for matching to find. Raises UsageError for a
    network without a layer that can be quantised.
    """
    layers = quantizable_linears(network, quantization)
    if not layers:
        raise UsageError(
            f"No layer in {checkpoint.path} can be quantised: their inputs are no whole groups of "
            f"{quantization.group_size} weights.",
            "Leave --quantize out.",
        )
    tensors, dense = dict(checkpoint.tensors), {}
    for path, layer in layers.items():
        key = f"{path}.weight"
        info = checkpoint.tensors.get(key)
        if info is None or info.shape != layer.weight.shape:
            continue
        dense[key] = info
        packed, *floats = quantization.packed_shapes(info.shape).values()
        weight, *names = _packed_names(key)
        tensors[weight] = replace(info, dtype=PACKED, shape=packed)
        for name, shape in zip(names, floats, strict=True):  # whose bytes are those of the weight
            tensors[name] = replace(info, dtype="F32", shape=shape, nbytes=0)
    return replace(checkpoint, tensors=tensors, reader=QuantizingReader(quantization, dense))


def choose_quantization(model: ModelFolder, bits: int | None) -> ModelFolder:
    """`model` to be loaded with so many bits per weight; None is as it is.

    Raises UsageError for a folder that is quantised to others.
    """
    if bits is None:
        return model
    found = {
        kind for part in PARTS if (kind := Quantization.from_config(model.config(part))) is not None
    }
    others = found - {Quantization(bits)}
    if others:
        raise UsageError(
            f"{model.name} is quantised to {others.pop()}, which --quantize cannot change.",
            "Leave --quantize out, or take the model that it was made from.",
        )
    return replace(model, quantize_bits=None if found else bits)


def _packed_names(key: str) -> tuple[str, str, str]:
    """Names of what a weight becomes, the weight's own first."""
    stem = key.removesuffix("weight")
    return key, f"{stem}scales", f"{stem}biases"


def quantization_metadata(model: ModelFolder) -> dict[str, Any]:
    """For a video's metadata: {"quantization": {part: bits and group size}}, or {} without any.

    Raises WeightsError for a config.json that cannot be read.
    """
    found = {part: Quantization.from_config(model.config(part)) for part in PARTS}
    if model.quantize_bits is not None:
        found |= dict.fromkeys(("text_encoder", "transformer"), Quantization(model.quantize_bits))
    parts = {part: kind.to_dict() for part, kind in found.items() if kind is not None}
    return {"quantization": parts} if parts else {}
