"""Reading golden cases: tensors and tables that the reference code produced.

A case is one file. Its family is the longest known prefix of the file name; everything else (sizes,
constructor and call arguments) comes from the file, so that the tests run on unseen folders too.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

#: The committed cases.
DEFAULT_GOLDEN = Path(__file__).parents[1] / "parity" / "golden"

#: Families by file-name prefix; a longer prefix wins (`rflow_sample_mask` is still `rflow_sample`).
FAMILIES = (
    "t5",
    "stdit3",
    "vae_spatial",
    "vae_temporal",
    "vae_pipeline_decode",
    "vae_pipeline_encode",
    "rflow_timesteps",
    "rflow_add_noise",
    "rflow_sample",
    "text_clean",
    "text_score",
    "text_split",
    "text_json_prompt",
    "text_pipeline",
    "text_save_name",
    "text_model_args",
    "text_sizes",
    "text_mask_strategy",
    "text_append_generated",
    "tokens",
    "tokens_padded",
    "tokens_special",
    "manifest_stdit3",
    "manifest_t5",
    "manifest_vae",
    "lpl_synth",
    "lpl_script",
    "lpl_model",
    "lpl_tdtm_model",
    "lpl_fixed",
    "tdtm",
    "mask_strategy",
)


@dataclass(frozen=True)
class Case:
    """One golden file. `config` is its metadata (safetensors) or its whole content (JSON)."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def config(self) -> Any:
        if self.path.suffix == ".json":
            return json.loads(self.path.read_text())
        with self.path.open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            return json.loads(json.loads(f.read(size))["__metadata__"]["config"])

    @cached_property
    def tensors(self) -> dict[str, mx.array]:
        return dict(mx.load(str(self.path)))  # type: ignore[arg-type]

    def get(self, name: str) -> mx.array | None:
        """Tensor `name` (for example `in.x`), or None where the case has none."""
        return self.tensors.get(name)

    def __getitem__(self, name: str) -> mx.array:
        return self.tensors[name]

    @cached_property
    def weights(self) -> dict[str, mx.array]:
        """Reference parameters by reference name; `weights_from` names the file that holds them."""
        donor = self.config.get("weights_from")
        source = Case(self.path.with_name(donor)).tensors if donor else self.tensors
        prefix = "weights."
        return {k[len(prefix) :]: v for k, v in source.items() if k.startswith(prefix)}


def family(path: Path) -> str | None:
    """Longest known prefix of the file name, or None."""
    stem = path.stem
    known = [f for f in FAMILIES if stem == f or stem.startswith(f + "_")]
    return max(known, key=len) if known else None


def find_cases(folder: Path, *families: str) -> list[Case]:
    """All cases of the families in `folder`, sorted by name."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    return [Case(path) for path in files if family(path) in families]


def relative_error(actual: mx.array, expected: mx.array) -> float:
    """max |actual - expected| over the standard deviation of `expected`."""
    a, e = np.array(actual, dtype=np.float64), np.array(expected, dtype=np.float64)
    assert a.shape == e.shape, f"shape {a.shape}, expected {e.shape}"
    return float(np.abs(a - e).max() / (e.std() or 1.0))


def channels_last(x: mx.array) -> mx.array:
    """[B, C, ...] of the reference to [B, ..., C] of the engine."""
    return mx.moveaxis(x, 1, -1)


def channels_first(x: mx.array) -> mx.array:
    """[B, ..., C] of the engine to [B, C, ...] of the reference."""
    return mx.moveaxis(x, -1, 1)


def drop_padding(y: mx.array, mask: mx.array | None) -> list[mx.array]:
    """Split text y [B, L, C] into one array [n_i, C] per sample, without padding.

    mask: [b, L], non-zero for tokens. If b < B it is repeated, so that the null texts of a CFG
    batch have the lengths of the prompts. None keeps all rows.
    """
    if mask is None:
        return list(y)
    rows: list[list[int]] = mask.tolist()  # type: ignore[assignment]
    tokens = [mx.array([i for i, real in enumerate(row) if real], mx.int32) for row in rows]
    return [sample[tokens[i % len(tokens)]] for i, sample in enumerate(y)]
