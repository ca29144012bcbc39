"""Quantising weights while they are loaded, for a model folder that is not quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx import nn

from mlx_sora.errors import UsageError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import PARTS, ModelFolder
from mlx_sora.loading.quantize import Quantization, quantizable
from mlx_sora.loading.safetensors import PACKED, TensorInfo, load_tensors


@dataclass(frozen=True)
class Quantizing:
    """A Reader for which every tensor of `dense` comes quantised, as three.

    dense: weights by key, as they are stored. One after the other is evaluated, so that only one is
    in memory as it was.
    """

    quantization: Quantization
    dense: Mapping[str, TensorInfo]

    def __call__(
        self, file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None = None
    ) -> dict[str, mx.array]:
        weights = {key: self.dense[key] for key in tensors if key in self.dense}
        made = {name for key in weights for name in _names(key)}
        others = {key: info for key, info in tensors.items() if key not in made}
        arrays = load_tensors(file, weights | others, stream)
        for key in weights:
            parts = self.quantization.quantize(arrays.pop(key), mx.float32, stream)
            mx.eval(parts)
            arrays |= dict(zip(_names(key), parts.values(), strict=True))
        return arrays


def quantizing(
    checkpoint: Checkpoint, network: nn.Module, quantization: Quantization
) -> Checkpoint:
    """`checkpoint` as if it were quantised for `network`, which is not prepared yet.

    What it holds in other shapes stays as it is, for matching to find. Raises UsageError for a
    network without a layer that can be quantised.
    """
    layers = quantizable(network, quantization)
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
        packed, *floats = quantization.shapes(info.shape).values()
        weight, *names = _names(key)
        tensors[weight] = replace(info, dtype=PACKED, shape=packed)
        for name, shape in zip(names, floats, strict=True):  # whose bytes are those of the weight
            tensors[name] = replace(info, dtype="F32", shape=shape, nbytes=0)
    return replace(checkpoint, tensors=tensors, read=Quantizing(quantization, dense))


def quantized_while_loading(model: ModelFolder, bits: int | None) -> ModelFolder:
    """`model` to be loaded with so many bits per weight; None is as it is.

    Raises UsageError for a folder that is quantised to others.
    """
    if bits is None:
        return model
    found = {kind for part in PARTS if (kind := Quantization.read(model.config(part))) is not None}
    others = found - {Quantization(bits)}
    if others:
        raise UsageError(
            f"{model.name} is quantised to {others.pop()}, which --quantize cannot change.",
            "Leave --quantize out, or take the model that it was made from.",
        )
    return replace(model, bits=None if found else bits)


def _names(key: str) -> tuple[str, str, str]:
    """Names of what a weight becomes, the weight's own first."""
    stem = key.removesuffix("weight")
    return key, f"{stem}scales", f"{stem}biases"
