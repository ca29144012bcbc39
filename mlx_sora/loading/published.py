"""The published model before it is downloaded: its configurations and tensors without a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import (
    PUBLISHED,
    QUANTIZED_MODELS,
    Defaults,
    ModelFolder,
    bundled_folder,
    download_command,
    missing_parts,
    model_path,
)
from mlx_sora.loading.networks import empty_network
from mlx_sora.loading.quantization import CONFIG_KEY, named_quantization_of
from mlx_sora.loading.safetensors import FLOATS, PACKED, TensorInfo
from mlx_sora.memory.plan import FLOAT32_SIZE

#: Place of tensors without a file.
_NO_FILE = Path(os.devnull)


@dataclass(frozen=True)
class PublishedModel(ModelFolder):
    """Open-Sora 1.2, maybe quantized, as `download` will write it; for plans only.

    stored_bits: per quantized weight in the files; None for the published ones, which are float32.
    """

    stored_bits: int | None = None

    @property
    def tokenizer(self) -> Path:
        """Tokenizer of the bundled model, which is the published one."""
        return bundled_folder() / "tokenizer" / "spiece.model"

    @property
    def notice(self) -> str:
        """One line for the user."""
        return (
            f"{self.name} is not downloaded; this plan follows from its published configuration. "
            f"Get it: {download_command(self.name)}"
        )

    def config(self, part: str) -> dict[str, Any]:
        """Return what a config.json has to say: sizes are the defaults of this package."""
        if self.stored_bits is None or part == "vae":
            return {}
        return {CONFIG_KEY: named_quantization_of(part, self.stored_bits).to_dict()}

    def checkpoint(self, part: str) -> Checkpoint:
        """Return the tensors of a part under the names of the parameters. All are zeros."""
        network, _ = empty_network(self, part)
        leaves: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
        tensors = {name: self._tensor(value) for name, value in leaves}
        return Checkpoint(_NO_FILE, tensors, zero_tensors)

    def _tensor(self, value: mx.array) -> TensorInfo:
        count = prod(value.shape)
        if value.dtype == mx.uint32:
            return TensorInfo(_NO_FILE, PACKED, value.shape, 0, FLOAT32_SIZE * count)
        if self.stored_bits is not None and value.ndim > 1:
            return TensorInfo(_NO_FILE, "BF16", value.shape, 0, 2 * count)
        return TensorInfo(_NO_FILE, "F32", value.shape, 0, FLOAT32_SIZE * count)


def zero_tensors(
    file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None = None
) -> dict[str, mx.array]:
    """Return zeros in place of the tensors; nothing is allocated before they are evaluated."""
    types = FLOATS | {PACKED: mx.uint32}
    return {
        name: mx.zeros(info.shape, types[info.dtype], stream=stream)
        for name, info in tensors.items()
    }


def find_undownloaded(model: str | Path | None) -> PublishedModel | None:
    """Return a published model by name if it is not downloaded, or not completely; else None."""
    bits = {name: bits for bits, name in QUANTIZED_MODELS.items()} | {PUBLISHED: None}
    if str(model) not in bits:
        return None
    path = model_path(str(model))
    if not missing_parts(path):
        return None
    return PublishedModel(path, str(model), Defaults(), stored_bits=bits[str(model)])
