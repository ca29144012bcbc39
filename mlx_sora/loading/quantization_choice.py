"""Choice of the quantization of a model: forms by name, and averages by measured sensitivities.

`calibrate --bits` measures, by layer and bits, the error that it brings to the latents, for the
file SENSITIVITIES: {"layers": {"transformer": {"spatial_blocks.0.mlp.fc1": {"3": 0.002, ...}, ...},
"text_encoder": {...}}, "weights": "sha256:...", "about": {...}}.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sora.errors import UsageError, shell_words
from mlx_sora.loading.model_folder import PARTS, ModelFolder, model_argument
from mlx_sora.loading.networks import quantizable_layers
from mlx_sora.loading.quantization import (
    EMBEDDING,
    NetworkQuantization,
    embedding_form,
    named_form,
    named_quantization_of,
)
from mlx_sora.loading.safetensors import FLOATS, read_rows
from mlx_sora.request.options import MIXED, NETWORKS, WIDTHS, forms_by_part
from mlx_sora.utils.files import atomic_write, explain_os_errors
from mlx_sora.utils.json import read_object

#: File of a model with the sensitivities of its layers.
SENSITIVITIES = "sensitivities.json"


@dataclass(frozen=True)
class Sensitivities:
    """Squared relative errors of the last latents by part, layer and bits of one model.

    weights: hash of the model's weights. about: how they were measured.
    """

    weights: str
    layers: Mapping[str, Mapping[str, Mapping[str, float]]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path, *, overwrite: bool = False) -> Path:
        """Write the file as JSON, atomically; return where. Raises UsageError."""
        text = json.dumps(asdict(self)).replace('}, "', '},\n"').replace(': {"', ':\n{"')
        with (
            explain_os_errors(path, UsageError),
            atomic_write(path, overwrite, error=UsageError) as file,
        ):
            file.partial.write_text(text + "\n", encoding="utf-8")
        return file.path


def read_sensitivities(model: ModelFolder) -> Sensitivities:
    """Read the sensitivities of `model`. Raises UsageError for those of another model."""
    path, name = model.path / SENSITIVITIES, model_argument(model.path)
    words = ["--bits", "--prompt", "TEXT", "--steps", 10, "--model", name]
    command = f"python -m mlx_sora calibrate {shell_words(*words)}"
    try:
        found = Sensitivities(**read_object(path))
        errors = [e for part in found.layers.values() for e in part.values()]
        widths = {str(bits) for bits in WIDTHS}
        sound = all(each.keys() == widths and all(map(_is_error, each.values())) for each in errors)
        if not sound or found.layers.keys() != set(NETWORKS.values()):
            raise ValueError("no sensitivities")
    except FileNotFoundError:
        raise UsageError(f"{model.name} has no {SENSITIVITIES}.", f"Make it: {command}") from None
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, TypeError, AttributeError):
        raise UsageError(f"{path} is damaged.", f"Make it again: {command} --overwrite") from None
    if found.weights != weights_hash(model):
        raise UsageError(
            f"{path} belongs to other weights.", f"Make it again: {command} --overwrite"
        )
    return found


def _is_error(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


def weights_hash(model: ModelFolder) -> str:
    """Return a hash of the first row of each layer that can be quantized, as bfloat16.

    It is that of the model in any type of floats, and quickly read.
    """
    import numpy as np

    digest = hashlib.sha256()
    for part in NETWORKS.values():
        tensors = model.checkpoint(part).tensors
        for path in quantizable_layers(model, part, NetworkQuantization(named_form(WIDTHS[0]))):
            info = tensors.get(f"{path}.weight")
            if info is not None and info.dtype in FLOATS:
                row = read_rows(info, [0]).astype(mx.bfloat16)
                digest.update(path.encode() + np.asarray(row.view(mx.uint16)).tobytes())
    return f"sha256:{digest.hexdigest()}"


def mixed_quantization(model: ModelFolder, bits: float) -> dict[str, NetworkQuantization]:
    """Return widths of all layers, `bits` on average over the weights, with the least error.

    T5's table of tokens is not measured, and has a width of its own.
    Raises UsageError without the model's sensitivities.
    """
    errors = read_sensitivities(model).layers
    shapes = {
        (part, path): info.shape
        for part in errors
        for path in errors[part]
        if (info := model.checkpoint(part).tensors.get(f"{path}.weight")) is not None
    }
    sizes = {layer: math.prod(shape) for layer, shape in shapes.items()}
    curves = {layer: {int(b): e for b, e in errors[layer[0]][layer[1]].items()} for layer in sizes}
    widths = dict(spend(sizes, curves, int(bits * sum(sizes.values()))))
    table = ("text_encoder", EMBEDDING), embedding_form(next(n for n in WIDTHS if n >= bits))
    forms = [(layer, named_form(width)) for layer, width in widths.items()]
    return {
        part: NetworkQuantization(
            None, tuple((path, form) for (own, path), form in (*forms, table) if own == part)
        )
        for part in errors
    }


def spend(
    sizes: Mapping[tuple[str, str], int],
    errors: Mapping[tuple[str, str], Mapping[int, float]],
    budget: int,
) -> Iterator[tuple[tuple[str, str], int]]:
    """Yield each layer and its width: the least sum of errors within `budget` bits in all.

    sizes: weights of the layers. errors: by layer and width. Widths grow from the smallest, first
    where a bit saves most; that is the best choice but for the last layer, if errors are convex.
    """
    widths = dict.fromkeys(sizes, WIDTHS[0])
    budget -= WIDTHS[0] * sum(sizes.values())

    def step(layer: tuple[str, str]) -> tuple[float, tuple[str, str], int] | None:
        now = widths[layer]
        wider = [(n, errors[layer][now] - errors[layer][n]) for n in WIDTHS if n > now]
        gains = [(saved / (sizes[layer] * (n - now)), n) for n, saved in wider]
        best = max(gains, default=(0.0, 0))
        return (-best[0], layer, best[1]) if best[0] > 0 else None

    steps = [found for layer in sizes if (found := step(layer)) is not None]
    heapq.heapify(steps)
    while steps:
        _, layer, width = heapq.heappop(steps)
        cost = sizes[layer] * (width - widths[layer])
        if cost > budget:
            continue
        budget, widths[layer] = budget - cost, width
        if (found := step(layer)) is not None:
            heapq.heappush(steps, found)
    yield from widths.items()


def named_quantization(model: ModelFolder, value: int | str) -> dict[str, NetworkQuantization]:
    """Return the quantization of each part of `model`, of a value of --quantize.

    Raises UsageError for an average without the model's sensitivities.
    """
    if str(value).startswith(MIXED):
        return mixed_quantization(model, float(str(value).removeprefix(MIXED)))
    return {part: named_quantization_of(part, form) for part, form in forms_by_part(value).items()}


def choose_quantization(model: ModelFolder, value: int | str | None) -> ModelFolder:
    """Return `model` with the quantization on load that --quantize asks for; None: none.

    Raises UsageError for a folder whose parts are quantized otherwise.
    """
    if value is None:
        return model
    found = stored_quantization(model)
    mixed = str(value).startswith(MIXED)
    wanted = {} if found and mixed else named_quantization(model, value)
    for part, stored in found.items():
        if mixed or (part in wanted and _kinds(stored) != _kinds(wanted[part])):
            raise UsageError(
                f"{model.name} is quantized to {stored}, which --quantize cannot change.",
                "Leave --quantize out, or take the model that it was converted from.",
            )
    rest = {part: forms for part, forms in wanted.items() if part not in found}
    return replace(model, quantization=tuple(rest.items()))


def _kinds(quantization: NetworkQuantization) -> set[tuple[str, int]]:
    """Return modes and bits; a folder may have them with another rotation."""
    return {(form.mode, form.bits) for form in quantization.forms}


def stored_quantization(model: ModelFolder) -> dict[str, NetworkQuantization]:
    """Return the quantization of the quantized parts of a folder. Raises WeightsError."""
    found = {part: NetworkQuantization.from_config(model.config(part)) for part in PARTS}
    return {part: settings for part, settings in found.items() if settings is not None}


def quantization_metadata(model: ModelFolder) -> dict[str, Any]:
    """Return {"quantization": {part: form}} for a video's metadata, or {}.

    Raises WeightsError for a config.json that cannot be read.
    """
    settings = stored_quantization(model) | dict(model.quantization)
    parts = {part: settings[part].summary() for part in PARTS if part in settings}
    return {"quantization": parts} if parts else {}
