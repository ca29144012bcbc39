"""Affine quantization of the linear layers of a network.

Only the linear layers in the blocks of T5 and STDiT are quantized. Embedders, norms, time
modulation, final layer, scale-shift tables and the VAE keep their values. config.json records it as
in other MLX models: {"quantization": {"bits": 8, "group_size": 64}}.
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
from mlx_sora.loading.safetensors import PACKED, Reader, TensorInfo, load_tensors
from mlx_sora.models.config import FIX
from mlx_sora.models.key_map import Shape
from mlx_sora.models.quantized import WORD_BITS, QuantizedLinear

#: Key of the settings in config.json.
CONFIG_KEY = "quantization"

BITS = (4, 8)
GROUP_SIZE = 64

#: Prefix of the parameter paths of a block, with the number of the block.
BLOCK_PATH = re.compile(r"(?:encoder\.block|spatial_blocks|temporal_blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Quantization:
    """Settings. bits: per weight; group_size: weights in a row that share scale and bias."""

    bits: int
    group_size: int = GROUP_SIZE

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Quantization | None:
        """Read the settings of a config.json; None for a network that is not quantized.

        Raises WeightsError for settings that this package does not write.
        """
        values = config.get(CONFIG_KEY)
        if values is None:
            return None
        for bits in BITS:
            if values == cls(bits).to_dict():
                return cls(bits)
        raise WeightsError(f"{CONFIG_KEY} cannot be {values!r} in a model's config.json.", FIX)

    def to_dict(self) -> dict[str, int]:
        """Return the value for config.json."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}"

    def packed_shapes(self, shape: Shape) -> dict[str, Shape]:
        """Return shapes of the arrays that replace a weight [outputs, inputs], by parameter."""
        outputs, inputs = shape
        groups = (outputs, inputs // self.group_size)
        packed = (outputs, inputs * self.bits // WORD_BITS)
        return {"weight": packed, "scales": groups, "biases": groups}

    def quantize(
        self, weight: mx.array, dtype: mx.Dtype | None = None, stream: mx.Stream | None = None
    ) -> dict[str, mx.array]:
        """Quantize the weight [outputs, inputs] of a layer; return arrays by parameter name.

        dtype: of scales and biases; None selects the more accurate 16-bit type for them: float16 is
        eight times finer, except for the smallest numbers. stream: runs the work.
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
    """Return the squared error of the largest codes with scales and biases in `kind`."""
    error = scales.astype(kind).astype(mx.float32) - scales
    shift = biases.astype(kind).astype(mx.float32) - biases
    total: mx.array = (mx.square(255 * error) + mx.square(shift)).sum()
    return float(total.item())  # type: ignore[arg-type]


def quantizable_linears(network: nn.Module, quantization: Quantization) -> dict[str, nn.Linear]:
    """Return the layers of `network` to quantize, by path.

    Leaves out layers whose inputs do not divide into whole groups (STDiT3-3B has such).
    """
    return {
        path: layer
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
        and BLOCK_PATH.match(path)
        and layer.weight.shape[1] % quantization.group_size == 0
    }


def insert_quantized_layers(network: nn.Module, quantization: Quantization | None) -> None:
    """Replace layers of a `network` without weights by quantized layers."""
    if quantization is None:
        return
    layers = []
    for path, layer in quantizable_linears(network, quantization).items():
        outputs, inputs = layer.weight.shape
        new = QuantizedLinear(inputs, outputs, bias="bias" in layer, **quantization.to_dict())
        layers.append((path, new))
    network.update_modules(tree_unflatten(layers))


def dense_bytes(network: nn.Module, dtype: mx.Dtype) -> dict[str, int]:
    """Return the bytes of each quantized layer's weights dequantized to `dtype`, by path."""
    return {
        path: layer.dense_size * dtype.size
        for path, layer in network.named_modules()
        if isinstance(layer, QuantizedLinear)
    }


def count_parameters(checkpoint: Checkpoint, quantization: Quantization | None) -> int:
    """Count the parameters of the network, without scales and biases of its quantization."""
    counts = [(prod(info.shape), info.dtype) for info in checkpoint.tensors.values()]
    total = sum(count for count, _ in counts)
    if quantization is None:
        return total
    words = sum(count for count, dtype in counts if dtype == PACKED)
    codes = words * WORD_BITS // quantization.bits
    return total - words + codes - 2 * codes // quantization.group_size


@dataclass(frozen=True)
class QuantizingReader:
    """A Reader that quantizes `weights`, each into three tensors.

    weights: stored tensors by key. They are evaluated one by one, so that only one is in memory
    unquantized. reader: loads them.
    """

    quantization: Quantization
    weights: Mapping[str, TensorInfo]
    reader: Reader = load_tensors

    def __call__(
        self, file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None = None
    ) -> dict[str, mx.array]:
        weights = {key: self.weights[key] for key in tensors if key in self.weights}
        packed = {name for key in weights for name in packed_names(key)}
        others = {key: info for key, info in tensors.items() if key not in packed}
        arrays = self.reader(file, weights | others, stream)
        for key in weights:
            quantized = self.quantization.quantize(arrays.pop(key), mx.float32, stream)
            mx.eval(quantized)
            arrays |= dict(zip(packed_names(key), quantized.values(), strict=True))
        return arrays


def quantize_on_load(
    checkpoint: Checkpoint, network: nn.Module, quantization: Quantization
) -> Checkpoint:
    """Return `checkpoint` with a reader that quantizes the linear layers of `network`.

    network: not quantized yet. Tensors of unexpected shape are left for `match_keys` to report.
    Raises UsageError for a network without a layer that can be quantized.
    """
    layers = quantizable_linears(network, quantization)
    if not layers:
        raise UsageError(
            f"No layer in {checkpoint.path} can be quantized: no input size is a multiple of the "
            f"group size {quantization.group_size}.",
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
        weight, *names = packed_names(key)
        tensors[weight] = replace(info, dtype=PACKED, shape=packed)
        for name, shape in zip(names, floats, strict=True):  # their bytes count with the weight
            tensors[name] = replace(info, dtype="F32", shape=shape, nbytes=0)
    return replace(
        checkpoint, tensors=tensors, reader=QuantizingReader(quantization, dense, checkpoint.reader)
    )


def choose_quantization(model: ModelFolder, bits: int | None) -> ModelFolder:
    """Return `model` with the bits per weight to quantize to on load; None changes nothing.

    Raises UsageError for a folder that is quantized to another number of bits.
    """
    if bits is None:
        return model
    found = set(_read_settings(model).values())
    others = found - {Quantization(bits)}
    if others:
        raise UsageError(
            f"{model.name} is quantized to {others.pop()}, which --quantize cannot change.",
            "Leave --quantize out, or take the model that it was converted from.",
        )
    return replace(model, quantize_bits=None if found else bits)


def quantization_metadata(model: ModelFolder) -> dict[str, Any]:
    """Return {"quantization": {part: bits and group size}} for a video's metadata, or {}.

    Raises WeightsError for a config.json that cannot be read.
    """
    settings = _read_settings(model)
    if model.quantize_bits is not None:
        settings |= dict.fromkeys(
            ("text_encoder", "transformer"), Quantization(model.quantize_bits)
        )
    parts = {part: settings[part].to_dict() for part in PARTS if part in settings}
    return {"quantization": parts} if parts else {}


def packed_names(key: str) -> tuple[str, str, str]:
    """Return the names of packed weight, scales and biases of the weight `key`."""
    stem = key.removesuffix("weight")
    return key, f"{stem}scales", f"{stem}biases"


def _read_settings(model: ModelFolder) -> dict[str, Quantization]:
    found = {part: Quantization.from_config(model.config(part)) for part in PARTS}
    return {part: settings for part, settings in found.items() if settings is not None}
