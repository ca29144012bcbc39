"""Descriptions of folders and files that are given as a model but are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_sora.errors import printable
from mlx_sora.utils.files import visible_files
from mlx_sora.utils.json import read_object

#: Suffixes of checkpoints in one file, as other programs use them.
SINGLE_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")

#: Longest name of a class in messages, in characters.
MAX_NAME = 60


def describe_other_model(path: Path) -> str | None:
    """Return what `path` is, for a sentence that begins with it; None if that is not known.

    Reads configurations only.
    """
    if path.is_file():
        return "is a file, as ComfyUI has them, not a model folder"
    index, network = _read(path / "model_index.json"), _read(path / "config.json")
    transformer = _read(path / "transformer" / "config.json")
    if "_class_name" in index or "_class_name" in transformer:
        kind = index.get("_class_name", transformer.get("_class_name"))
        return f"is a diffusers pipeline of another model ({_shown(kind)})"
    kind = network.get("_class_name", network.get("model_type"))
    if kind is not None:
        return f"holds one network ({_shown(kind)}), as mlx-lm and transformers have them"
    files = [file for suffix in SINGLE_FILES for file in visible_files(path, f"*{suffix}")]
    if files and not (path / "transformer").is_dir():
        return f"holds single files ({printable(files[0].name, MAX_NAME)}), as ComfyUI has them"
    return None


def _shown(kind: object) -> str:
    return printable(str(kind), MAX_NAME)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}
