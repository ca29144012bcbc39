"""Quantization of the linear layers of a network.

The linear layers in the blocks of T5 and STDiT are quantized, and T5's table of tokens. Embedders,
norms, time modulation, final layer, scale-shift tables and the VAE keep their values. config.json
records it as in other MLX models: {"quantization": {"bits": 8, "group_size": 64}}, with the mode if
it is not affine, and the layers of another form under their paths. The table is quantized only if
it is among those. "rotation" is this package's own key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.safetensors import (
    CODES,
    FLOATS,
    PACKED,
    SCALES,
    Reader,
    TensorInfo,
    load_tensors,
)
from mlx_sora.models.config import FIX
from mlx_sora.models.quantized import (
    AFFINE,
    FLOAT_MODES,
    WORD_BITS,
    Quantization,
    QuantizedEmbedding,
    QuantizedLinear,
)
from mlx_sora.models.t5 import EMBEDDING_KEY
from mlx_sora.request.options import WIDTHS

#: Key of the settings in config.json.
CONFIG_KEY = "quantization"

#: Weights in a row that share scale and bias.
GROUP_SIZE = 64

#: Size of the Hadamard blocks of a rotation, and the widths that are rotated: 8 bits are as good as
#: float without it, and small floats are worse with it.
ROTATION, ROTATED = 128, (3, 4, 5, 6)

#: Affine widths, sizes of groups and of Hadamard blocks that a config.json may have.
_BITS, _GROUPS, _ROTATIONS = (2, 3, 4, 5, 6, 8), (32, 64, 128), (0, 64, 128)

#: Path of T5's table of tokens, and the fewest bits that it gets: 3 % of the weights, and all that
#: T5 sees of a prompt.
EMBEDDING, EMBEDDING_BITS = EMBEDDING_KEY.removesuffix(".weight"), 5

#: Prefix of the parameter paths of a block, with the number of the block.
BLOCK_PATH = re.compile(r"(?:encoder\.block|spatial_blocks|temporal_blocks)\.(\d+)\.")


def named_form(name: int | str) -> Quantization:
    """Return the form of a number of bits, or of a mode of small floats."""
    if isinstance(name, int):
        return Quantization(name, GROUP_SIZE, rotation=ROTATION if name in ROTATED else 0)
    return Quantization(*FLOAT_MODES[name], mode=name)


def embedding_form(name: int | str) -> Quantization:
    """Return the form of T5's table of tokens beside layers of `named_form(name)`: wider by one."""
    bits = named_form(name).bits
    wider = (n for n in WIDTHS if n > bits and n >= EMBEDDING_BITS)
    return named_form(next(wider, WIDTHS[-1]))


def named_quantization_of(part: str, name: int | str) -> NetworkQuantization:
    """Return the quantization of the network `part` to the form of that name."""
    tables = ((EMBEDDING, embedding_form(name)),) if part == "text_encoder" else ()
    return NetworkQuantization(named_form(name), tables)


@dataclass(frozen=True)
class NetworkQuantization:
    """Forms of the quantized layers of a network.

    default: of every layer that `layers` does not name; None: those are not quantized. layers:
    pairs of path and form. In config.json, as mlx-lm writes it: the default's values, and those of
    each layer under its path.
    """

    default: Quantization | None
    layers: tuple[tuple[str, Quantization], ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NetworkQuantization | None:
        """Read the settings of a config.json; None for a network that is not quantized.

        Raises WeightsError for settings that MLX does not have.
        """
        values = config.get(CONFIG_KEY)
        if values is None:
            return None
        try:
            own = {name: value for name, value in values.items() if not isinstance(value, dict)}
            layers = [(path, value) for path, value in values.items() if path not in own]
            default = _read_form(own) if own or not layers else None
            return cls(default, tuple((path, _read_form(value)) for path, value in layers))
        except (TypeError, ValueError, AttributeError):
            raise WeightsError(
                f"{CONFIG_KEY} cannot be {str(values)[:200]} in a model's config.json.", FIX
            ) from None

    def form(self, path: str) -> Quantization | None:
        """Return the form of the layer at `path`, None if it is not quantized."""
        return dict(self.layers).get(path, self.default)

    @property
    def forms(self) -> tuple[Quantization, ...]:
        """All forms of linear layers, each once."""
        own = () if self.default is None else (self.default,)
        return tuple(dict.fromkeys((*own, *(form for _, form in self._linears))))

    @property
    def _linears(self) -> tuple[tuple[str, Quantization], ...]:
        return tuple((path, form) for path, form in self.layers if path != EMBEDDING)

    def to_dict(self) -> dict[str, Any]:
        """Return the value for config.json."""
        own = {} if self.default is None else self.default.to_dict()
        return own | {path: form.to_dict() for path, form in self.layers}

    def summary(self) -> dict[str, Any]:
        """Return JSON values for metadata: the one form, or the number of layers of each.

        With the latter comes a hash of all layers and their forms.
        """
        if not self._linears:
            return self.to_dict()
        text = json.dumps(self.to_dict(), sort_keys=True)
        layers = Counter(str(form) for _, form in self.layers)
        return {"layers": dict(layers), "sha256": hashlib.sha256(text.encode()).hexdigest()}

    def __str__(self) -> str:
        return ", or ".join(map(str, self.forms))


def table_form(quantization: NetworkQuantization | None, channels: int) -> Quantization | None:
    """Return the form of T5's table of `channels` per token, None if it is not quantized."""
    form = None if quantization is None else dict(quantization.layers).get(EMBEDDING)
    return form if form is not None and form.fits(channels) else None


def _read_form(values: Mapping[str, Any]) -> Quantization:
    """Read the form of a layer. Raises TypeError or ValueError for one that is not known."""
    form = Quantization(**values)
    if form.mode == AFFINE:
        known = form.bits in _BITS and form.group_size in _GROUPS and form.rotation in _ROTATIONS
    else:
        known = (form.bits, form.group_size) == FLOAT_MODES.get(form.mode) and not form.rotation
    if not known or not all(type(value) in (int, str) for value in values.values()):
        raise ValueError("no form of quantization")
    return form


def quantizable_linears(
    network: nn.Module, quantization: NetworkQuantization
) -> dict[str, tuple[nn.Linear, Quantization]]:
    """Return the layers of `network` to quantize and their forms, by path.

    Leaves out layers whose inputs do not divide into whole groups (STDiT3-3B has such).
    """
    named = dict(quantization.layers)
    return {
        path: (layer, form)
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
        and BLOCK_PATH.match(path)
        and (form := named.get(path, quantization.default)) is not None
        and form.fits(layer.weight.shape[1])
    }


def insert_quantized_layers(network: nn.Module, quantization: NetworkQuantization | None) -> None:
    """Replace layers of a `network` without weights by quantized layers."""
    if quantization is None:
        return
    layers: list[tuple[str, nn.Module]] = []
    for path, (layer, form) in quantizable_linears(network, quantization).items():
        outputs, inputs = layer.weight.shape
        new = QuantizedLinear(inputs, outputs, bias="bias" in layer, **form.to_dict())
        layers.append((path, new))
    if EMBEDDING in network:
        count, channels = network[EMBEDDING].weight.shape
        table = table_form(quantization, channels)
        if table is not None:
            layers.append((EMBEDDING, QuantizedEmbedding(count, channels, **table.to_dict())))
    network.update_modules(tree_unflatten(layers))


def dense_bytes(network: nn.Module, dtype: mx.Dtype, rows: int | None = None) -> dict[str, int]:
    """Return the bytes of each quantized layer's weights dequantized to `dtype`, by path.

    With a rotation come the rotated inputs, `rows` of them, or as many bytes again: the smaller is
    rotated.
    """
    return {
        path: dtype.size * (layer.dense_size + _rotated_size(layer, rows))
        for path, layer in network.named_modules()
        if isinstance(layer, QuantizedLinear)
    }


def _rotated_size(layer: QuantizedLinear, rows: int | None) -> int:
    most = layer.dense_size if rows is None else min(layer.dense_size, rows * layer.inputs)
    return most if layer.form.rotation else 0


def packed_weights(
    checkpoint: Checkpoint, quantization: NetworkQuantization | None
) -> Iterator[tuple[Quantization, int]]:
    """Yield form and number of weights of each quantized layer of a checkpoint."""
    forms = {} if quantization is None else dict(quantization.layers)
    for key, info in checkpoint.tensors.items():
        if quantization is not None and info.dtype == PACKED:
            form = forms.get(key.removesuffix(".weight"), quantization.default)
            if form is not None:
                yield form, prod(info.shape) * WORD_BITS // form.bits


def count_parameters(checkpoint: Checkpoint, quantization: NetworkQuantization | None) -> int:
    """Count the parameters of the network, without scales and biases of its quantization."""
    count = sum(prod(info.shape) for info in checkpoint.tensors.values())
    for form, weights in packed_weights(checkpoint, quantization):
        count += weights - weights * form.bits // WORD_BITS
        count -= (len(form.parameters) - 1) * weights // form.group_size
    return count


def average_bits(checkpoint: Checkpoint, quantization: NetworkQuantization) -> float:
    """Return the bits per quantized weight of linear layers, without scales and biases."""
    tensors = {key: info for key, info in checkpoint.tensors.items() if key != EMBEDDING_KEY}
    found = list(packed_weights(replace(checkpoint, tensors=tensors), quantization))
    return sum(form.bits * n for form, n in found) / max(1, sum(n for _, n in found))


@dataclass(frozen=True)
class QuantizingReader:
    """A Reader that quantizes `weights`, each into two or three tensors.

    weights: stored tensor and form by key. They are evaluated one by one, so that only one is in
    memory unquantized. reader: loads them.
    """

    weights: Mapping[str, tuple[TensorInfo, Quantization]]
    reader: Reader = load_tensors

    def __call__(
        self, file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None = None
    ) -> dict[str, mx.array]:
        weights = {key: self.weights[key] for key in tensors if key in self.weights}
        packed = {name for key, (_, form) in weights.items() for name in packed_names(key, form)}
        others = {key: info for key, info in tensors.items() if key not in packed}
        dense = {key: info for key, (info, _) in weights.items()}
        arrays = self.reader(file, dense | others, stream)
        for key, (_, form) in weights.items():
            quantized = form.quantize(arrays.pop(key), mx.float32, stream)
            mx.eval(quantized)
            arrays |= dict(zip(packed_names(key, form), quantized.values(), strict=True))
        return arrays


def quantize_on_load(
    checkpoint: Checkpoint, network: nn.Module, quantization: NetworkQuantization
) -> Checkpoint:
    """Return `checkpoint` with a reader that quantizes the linear layers of `network`.

    network: not quantized yet. Tensors of unexpected shape are left for `match_keys` to report.
    Raises UsageError for a network without a layer that can be quantized.
    """
    layers = quantizable_linears(network, quantization)
    if not layers:
        raise UsageError(
            f"No layer in {checkpoint.path} can be quantized: no input size is a multiple of the "
            f"group size {max(form.group_size for form in quantization.forms)}.",
            "Leave --quantize out.",
        )
    tensors, dense = dict(checkpoint.tensors), {}
    for path, (layer, form) in layers.items():
        key = f"{path}.weight"
        info = checkpoint.tensors.get(key)
        if info is None or info.shape != layer.weight.shape:
            continue
        dense[key] = (info, form)
        packed, *floats = form.packed_shapes(info.shape).values()
        weight, *names = packed_names(key, form)
        tensors[weight] = replace(info, dtype=PACKED, shape=packed)
        kind = "F32" if form.mode == AFFINE else SCALES
        for name, shape in zip(names, floats, strict=True):  # their bytes count with the weight
            tensors[name] = replace(info, dtype=kind, shape=shape, nbytes=0)
    return replace(checkpoint, tensors=tensors, reader=QuantizingReader(dense, checkpoint.reader))


@dataclass(frozen=True)
class TokenTable:
    """T5's table of tokens in a checkpoint, of which only rows are read.

    form: of quantized rows in the file, None for floats. rounding: form to round those to.
    """

    checkpoint: Checkpoint
    form: Quantization | None = None
    rounding: Quantization | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of its tensors in the file."""
        return (EMBEDDING_KEY,) if self.form is None else packed_names(EMBEDDING_KEY, self.form)

    def check(self, count: int, channels: int) -> None:
        """Raise WeightsError unless the file has a table of this size."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (count, channels)}
        if self.form is not None:
            shapes = self.form.packed_shapes((count, channels))
        for key, expected in zip(self.keys, shapes.values(), strict=True):
            info = self.checkpoint.tensors.get(key)
            if info is None or info.shape != expected:
                found = "missing" if info is None else f"of shape {list(info.shape)}"
                raise WeightsError(
                    f"{self.checkpoint.path}: {key} is {found}, expected {list(expected)}.",
                    "The file and its config.json do not belong together.",
                )

    def __call__(self, ids: Sequence[int]) -> mx.array:
        """Return the rows of `ids`, [n, channels]."""
        if self.form is None:
            rows = self.checkpoint.read_rows(EMBEDDING_KEY, ids)
            form = self.rounding
            return rows if form is None else form.restore(form.quantize(rows, mx.float32))
        types = (*CODES, *FLOATS)
        rows_of = (self.checkpoint.read_rows(key, ids, types) for key in self.keys)
        return self.form.restore(dict(zip(self.form.parameters, rows_of, strict=True)))


def packed_names(key: str, form: Quantization) -> tuple[str, ...]:
    """Return the names of the tensors that replace the weight `key`."""
    stem = key.removesuffix("weight")
    return tuple(f"{stem}{name}" for name in form.parameters)
