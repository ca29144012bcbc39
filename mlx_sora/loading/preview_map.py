"""The preview map of a model folder: preview.json, and whether it belongs to the VAE there."""

from __future__ import annotations

import json
from math import isclose
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_sora.errors import WeightsError, shell_words
from mlx_sora.loading.file_guard import WeightFileGuard
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_vae
from mlx_sora.models.preview_map import PreviewMap
from mlx_sora.models.vae import VideoVAE
from mlx_sora.utils.files import atomic_write
from mlx_sora.utils.json import read_object
from mlx_sora.video.preview import PREVIEW_FILE

#: Share by which a number of the VAE may differ: 8-bit floats round by up to 6 %, other VAEs differ
#: more.
_TOLERANCE = 0.07


def load_preview_map(model: ModelFolder, channels: int) -> PreviewMap | None:
    """Load the map of a model for latents of C channels, or return None if it has none.

    Raises WeightsError for an invalid file, and for the map of another VAE.
    """
    file = model.path / PREVIEW_FILE
    if not file.is_file():
        return None
    fix = f"Delete it, or make another: {preview_command(model)} --overwrite"
    try:
        found = PreviewMap.from_dict(read_object(file), channels)
    except (OSError, ValueError, TypeError, LookupError, RecursionError, OverflowError) as error:
        raise WeightsError(f"{file} is not a preview map: {error}.", fix) from error
    if found.vae is not None and not _is_same(found.vae, vae_numbers(model)):
        raise WeightsError(f"{file} was fitted to another VAE than that of {model.name}.", fix)
    return found


def save_preview_map(path: Path, found: PreviewMap, *, overwrite: bool) -> Path:
    """Write a map; return where. Raises MlxSoraError."""
    with atomic_write(path, overwrite) as file:
        file.partial.write_text(json.dumps(found.to_dict()) + "\n", encoding="utf-8")
    return file.path


def vae_numbers(model: ModelFolder, vae: VideoVAE | None = None) -> tuple[float, ...]:
    """Return numbers that tell one VAE from another, whatever the type of its weights.

    They are those of the first layer of both decoders, a few dozen. vae: if it is loaded already.
    """
    with WeightFileGuard(model.vae).check_reads():
        vae = vae or load_vae(model)
        arrays = [
            value.astype(mx.float32).reshape(-1)
            for part in (vae.temporal_vae, vae.spatial_vae)
            for _, value in sorted(dict(tree_flatten(part.post_quant_conv.parameters())).items())
        ]
        numbers: list[float] = mx.concatenate(arrays).tolist()  # type: ignore[assignment]
    return tuple(round(number, 5) for number in numbers)


def preview_command(model: ModelFolder) -> str:
    """Return the command that fits a map for a model."""
    return f"python -m mlx_sora calibrate --preview --model {shell_words(model.path)}"


def _is_same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    largest = max(map(abs, other), default=0.0)
    return len(one) == len(other) and all(
        isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE * largest)
        for a, b in zip(one, other, strict=True)
    )
