"""Plan of a conversion: one file per streamed block, and the conversion of each tensor.

Pure functions of headers and configuration: names, types and sizes are known before any weight is
read or written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sora.accel.schedules import FOLDER as TABLES
from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_card import ModelCard
from mlx_sora.loading.model_folder import PARTS, ModelFolder
from mlx_sora.loading.networks import match_part, quantizable_layers
from mlx_sora.loading.quantization import (
    BLOCK_PATH,
    CONFIG_KEY,
    NetworkQuantization,
    packed_names,
)
from mlx_sora.loading.quantization_choice import (
    SENSITIVITIES,
    named_quantization,
    stored_quantization,
)
from mlx_sora.loading.safetensors import FLOATS, TensorInfo
from mlx_sora.models.gptq import compensate
from mlx_sora.models.quantized import AFFINE, Quantization
from mlx_sora.pipeline.calibrate import requests_for
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.request.options import MIXED
from mlx_sora.utils.files import visible_files
from mlx_sora.video.preview import PREVIEW_FILE

INDEX = "model.safetensors.index.json"

#: Key prefixes of the VAE's encoders and decoders. Each gets a file of its own.
_VAE_PREFIXES = tuple(
    f"{network}.{part}."
    for network in ("spatial_vae.module", "temporal_vae")
    for part in ("encoder", "decoder")
)

#: Bytes of a scale or bias if its 16-bit type is not chosen yet.
_SCALE_BYTES = 2


#: Most prompts that a model's card gives for a measurement. T5 needs many, and takes them fast.
TEXTS = 48


@dataclass(frozen=True)
class Gptq:
    """Compensation of quantization errors (`models/gptq.py`).

    prompts: T5 is measured on all of them, the transformer on the first VIDEOS, in `steps` steps.
    distill: steps in which the transformer then learns from the model of floats
    (`pipeline/distill.py`).
    """

    prompts: tuple[str, ...]
    steps: int = 10
    distill: int = 0

    @classmethod
    def suggested(cls, card: ModelCard) -> tuple[str, ...]:
        """Return the prompts that a model's card gives, which may be none."""
        return card.examples(TEXTS)

    def requests(self) -> list[GenerationRequest]:
        """Return the requests of the videos, of the model's default size."""
        return requests_for(self.prompts, {"steps": self.steps})

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        learned = {"distill": self.distill} if self.distill else {}
        return {"prompts": list(self.prompts), "steps": self.steps, **learned}


@dataclass(frozen=True)
class ConversionOptions:
    """Options of a conversion. None changes nothing.

    quantize: form of the linear layers in the blocks of T5 and STDiT; see `as_quantization`. dtype:
    of their other tensors, scales included; with quantize, None makes float32 matrices bfloat16 and
    scales one of the 16-bit types. Vectors (norms, constants) then keep their type. As in a run, T5
    becomes bfloat16 where STDiT becomes float16. gptq: compensates the errors of quantized weights.
    """

    quantize: int | str | None = None
    dtype: str | None = None
    gptq: Gptq | None = None

    def quantization(self, model: ModelFolder) -> dict[str, NetworkQuantization]:
        """Return the quantization of each part of `model` that is quantized."""
        return {} if self.quantize is None else named_quantization(model, self.quantize)

    def dtype_of(self, part: str) -> mx.Dtype | None:
        """Return the type for T5 or STDiT, the `part`; None keeps that of its tensors."""
        if self.dtype is None:
            return None
        dtype: mx.Dtype = getattr(mx, self.dtype)
        return mx.bfloat16 if dtype == mx.float16 and part == "text_encoder" else dtype


@dataclass(frozen=True)
class TensorConversion:
    """Conversion of the tensor `key` to another type or, quantized, to two or three tensors."""

    key: str
    info: TensorInfo
    dtype: mx.Dtype
    quantization: Quantization | None = None
    scale_dtype: mx.Dtype | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors to write."""
        if self.quantization is None:
            return (self.key,)
        return packed_names(self.key, self.quantization)

    @property
    def path(self) -> str:
        """Path of its layer in the network."""
        return self.key.removesuffix(".weight")

    @property
    def nbytes(self) -> int:
        """Size of the tensors to write, in bytes."""
        if self.quantization is None:
            return prod(self.info.shape) * self.dtype.size
        shapes = self.quantization.packed_shapes(self.info.shape)
        width = _SCALE_BYTES if self.scale_dtype is None else self.scale_dtype.size
        width = width if self.quantization.mode == AFFINE else mx.uint8.size
        sizes = {"weight": mx.uint32.size, "scales": width, "biases": width}
        return sum(prod(shape) * sizes[name] for name, shape in shapes.items())

    def apply(self, array: mx.array, moments: mx.array | None = None) -> dict[str, mx.array]:
        """Convert the tensor `array`; return evaluated arrays by name.

        moments: of the layer's inputs, for compensation. Raises WeightsError for numbers that
        float16 cannot hold.
        """
        if self.quantization is None:
            limit = mx.finfo(mx.float16).max
            if self.dtype == mx.float16 and (mx.abs(array) > limit).any().item():
                message = f"{self.info.file}: {self.key} exceeds {limit:.0f}, the limit of float16."
                raise WeightsError(message, "Convert to bfloat16.")
            arrays = {self.key: array.astype(self.dtype)}
        else:
            form, dtype = self.quantization, self.scale_dtype
            if moments is None:
                quantized = form.quantize(array, dtype)
            else:
                quantized = compensate(array, moments, form, dtype)
            arrays = dict(zip(self.names, quantized.values(), strict=True))
        mx.eval(arrays)
        return arrays


@dataclass(frozen=True)
class ShardPlan:
    """One file of a part."""

    part: str
    name: str
    conversions: Sequence[TensorConversion]

    @property
    def path(self) -> str:
        """Path in the model folder."""
        return f"{self.part}/{self.name}"

    @property
    def nbytes(self) -> int:
        """Size of its tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.conversions)

    @property
    def quantized_inputs(self) -> dict[str, int]:
        """Number of inputs of each quantized layer of a block, by path."""
        return {
            tensor.path: tensor.info.shape[1]
            for tensor in self.conversions
            if tensor.quantization is not None and BLOCK_PATH.match(tensor.key)
        }

    @property
    def source_bytes(self) -> int:
        """Size of the source tensors, in bytes."""
        return sum(tensor.info.nbytes for tensor in self.conversions)


def plan_part(model: ModelFolder, part: str, options: ConversionOptions) -> list[ShardPlan]:
    """Plan the files of `part`: blocks in the order of their use, then all other tensors.

    Leaves out tensors that the network does not use. Raises WeightsError for a checkpoint that does
    not match its configuration, UsageError for one that is quantized already.
    """
    if part in stored_quantization(model):
        raise UsageError(
            f"{model.path} is quantized already.", "Convert the model that it was converted from."
        )
    checkpoint = Checkpoint.open(model.path / part)
    entries = {entry.key: entry for entry in match_part(model, part, checkpoint)}
    quantization = options.quantization(model).get(part)
    forms = {} if quantization is None else quantizable_layers(model, part, quantization)
    groups: dict[int, list[TensorConversion]] = {}
    dtype = options.dtype_of(part)
    for key, info in checkpoint.tensors.items():
        if key in entries:
            # The VAE may compute in float32, as constants do: any loss of precision is final.
            if part == "vae" or entries[key].parameter.float32:
                change = TensorConversion(key, info, FLOATS[info.dtype])
            else:
                change = _plan_tensor(key, info, forms, dtype)
            groups.setdefault(_shard_order(key), []).append(change)
    count = len(groups)
    return [
        ShardPlan(part, f"model-{number:05}-of-{count:05}.safetensors", groups[group])
        for number, group in enumerate(sorted(groups), 1)
    ]


def _shard_order(key: str) -> int:
    """Return the number of the tensor's block or VAE prefix; other tensors come last."""
    block = BLOCK_PATH.match(key)
    if block is not None:
        return int(block[1])
    found = (i for i, prefix in enumerate(_VAE_PREFIXES) if key.startswith(prefix))
    return next(found, 1 << 30)


def _plan_tensor(
    key: str, info: TensorInfo, forms: Mapping[str, Quantization], dtype: mx.Dtype | None
) -> TensorConversion:
    """Plan the conversion of one tensor to `dtype`; see ConversionOptions for None."""
    stored, form = FLOATS[info.dtype], forms.get(key.removesuffix(".weight"))
    if form is not None:
        return TensorConversion(key, info, stored, form, dtype)
    halve = forms and stored == mx.float32 and len(info.shape) > 1
    return TensorConversion(key, info, dtype or (mx.bfloat16 if halve else stored))


def index_text(shards: Sequence[ShardPlan]) -> str:
    """Return the index from tensor to file."""
    weight_map = {
        name: shard.name for shard in shards for c in shard.conversions for name in c.names
    }
    content = {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": weight_map,
    }
    return json.dumps(content, indent=2) + "\n"


def other_files(model: ModelFolder, options: ConversionOptions) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of all files that are written, except weights and their indexes."""
    quantization = options.quantization(model)
    for part in PARTS:
        config = model.config(part)
        if part in quantization:
            config[CONFIG_KEY] = quantization[part].to_dict()
        yield f"{part}/config.json", (json.dumps(config, indent=2) + "\n").encode()
    yield "tokenizer/spiece.model", model.tokenizer.read_bytes()
    index = model.path / "model_index.json"
    if index.is_file():
        yield index.name, index.read_bytes()
    yield from companion_files(model.path)


def companion_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of a model's preview map and tables, which no part needs."""
    tables = visible_files(folder / TABLES, "*.json")
    for file in (folder / PREVIEW_FILE, folder / SENSITIVITIES, *tables):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file.read_bytes()


def source_files(
    model: ModelFolder, options: ConversionOptions, shards: Sequence[ShardPlan]
) -> list[Path]:
    """Return every file that a conversion reads."""
    mixed = str(options.quantize).startswith(MIXED)
    measured = {model.path / SENSITIVITIES} if mixed else set()
    weights = {tensor.info.file for shard in shards for tensor in shard.conversions}
    configs = {model.path / part / "config.json" for part in PARTS}
    index = model.path / "model_index.json"
    return sorted(
        {*weights, *configs, *measured, model.tokenizer, *([index] if index.is_file() else [])}
    )
