"""Changes of a model folder that change none of its videos: for the doctor, no faults."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import PARTS, ModelFolder
from mlx_sora.loading.quantization import NetworkQuantization
from mlx_sora.manage import statistics
from mlx_sora.manage.conversion_plan import ConversionOptions
from mlx_sora.manage.convert import convert
from tests.helpers.mutations import FOLDERS, RECORDS

#: Changes the folder and returns the one to look at.
Change = Callable[[Path], Path]


def touch(model: Path) -> Path:
    for path in model.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return model


def save_again(model: Path, metadata: dict[str, str], *, sort: bool) -> Path:
    """Every file of tensors written anew: in another order, with other metadata."""
    for part in PARTS:
        for file in sorted((model / part).glob("*.safetensors")):
            tensors: Any = dict(mx.load(str(file)))
            mx.eval(tensors)
            names = sorted(tensors, reverse=sort)
            mx.save_safetensors(str(file), {name: tensors[name] for name in names}, metadata)
    return model


def take_tensors(folder: Path) -> dict[str, mx.array]:
    """The tensors of a part, whose files are removed."""
    checkpoint = Checkpoint.open(folder)
    tensors = checkpoint.load(checkpoint.tensors)
    mx.eval(tensors)
    for file in [*folder.glob("*.safetensors*")]:
        file.unlink()
    return tensors


def merge(model: Path) -> Path:
    """The tensors of a part in one file, under diffusers' name."""
    for part in PARTS:
        tensors = take_tensors(model / part)
        mx.save_safetensors(str(model / part / "diffusion_pytorch_model.safetensors"), tensors)
    return model


def split(model: Path) -> Path:
    """The tensors of a part in three shards with an index."""
    for part in PARTS:
        tensors = take_tensors(model / part)
        weight_map = {}
        for number in range(3):
            name = f"model-{number + 1:05}-of-00003.safetensors"
            names = sorted(tensors)[number::3]
            mx.save_safetensors(str(model / part / name), {key: tensors[key] for key in names})
            weight_map |= dict.fromkeys(names, name)
        index = json.dumps({"weight_map": weight_map})
        (model / part / "model.safetensors.index.json").write_text(index)
    return model


def rewrite_json(model: Path, write: Callable[[Any], str]) -> Path:
    for path in model.rglob("*.json"):
        if path.name not in statistics.RECORDS:
            path.write_text(write(json.loads(path.read_text())), encoding="utf-8")
    return model


def add_files(model: Path, *names: str) -> Path:
    for name in names:
        (model / name).write_bytes(b"# Anything\n")
    return model


def edit_texts(model: Path) -> Path:
    for name in ("README.md", "contact_sheet.png"):
        if (model / name).exists():
            (model / name).write_bytes(b"other")
    return model


def copy(model: Path) -> Path:
    return Path(shutil.copytree(model, model.with_name("a copy")))


def move(model: Path) -> Path:
    return model.rename(model.with_name("my model"))


def link(model: Path) -> Path:
    other = model.with_name("link")
    other.symlink_to(model)
    return other


def link_files(model: Path) -> Path:
    """A folder of links, as the hub's cache makes them."""
    other = model.with_name("links")
    for path in model.rglob("*"):
        if path.is_file():
            place = other / path.relative_to(model)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    return other


def copy_weights(model: Path) -> Path:
    for part in PARTS:
        for file in [*(model / part).glob("*.safetensors")]:
            shutil.copy(file, file.with_name(f"{file.stem} copy.safetensors"))
    return model


def protect(model: Path) -> Path:
    for path in model.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
    return model


def add_table(model: Path) -> Path:
    """A table as calibrate writes it."""
    (model / "step_cache").mkdir(exist_ok=True)
    content = {"steps": 8, "width": 64, "height": 64, "num_frames": 17}
    content |= {"orders": {"0": {"2": [0, 3]}}, "errors": {}, "about": {}}
    (model / "step_cache" / "8-steps-64x64-17.json").write_text(json.dumps(content))
    return model


def convert_to(options: ConversionOptions, model: Path) -> Path:
    """Another type by `convert`; a quantized folder, which convert refuses, is left as it is."""
    opened = ModelFolder.open(model)
    if any(NetworkQuantization.from_config(opened.config(part)) for part in PARTS):
        return model
    return convert(opened, model.with_name("converted"), options).path


def describe(model: Path) -> Path:
    """What a model says of itself, beside its name and defaults."""
    path = model / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"description": "x", "license": "y"}))
    return model


HARMLESS: dict[str, Change] = {
    "nothing": lambda model: model,
    "touched": touch,
    "other order": partial(save_again, metadata={}, sort=True),
    "metadata": partial(save_again, metadata={"format": "pt", "author": "me"}, sort=False),
    "one file": merge,
    "three shards": split,
    "one line of JSON": partial(rewrite_json, write=json.dumps),
    "sorted keys": partial(
        rewrite_json, write=lambda x: json.dumps(x, indent=8, sort_keys=True).replace("\n", "\r\n")
    ),
    "byte order mark": partial(rewrite_json, write=lambda x: "\ufeff" + json.dumps(x, indent=1)),
    "more files": lambda model: add_files(model, "LICENSE", "NOTICE.md", ".gitattributes", "a.bin"),
    "macOS": lambda model: add_files(model, ".DS_Store", "vae/._config.json", "._README.md"),
    "other texts": edit_texts,
    "description": describe,
    "copy": copy,
    "moved": move,
    "link": link,
    "links": link_files,
    "copies of weights": copy_weights,
    "read-only": protect,
    "new table": add_table,
    "float32": partial(convert_to, ConversionOptions(dtype="float32")),
    "float16": partial(convert_to, ConversionOptions(dtype="float16")),
    "8 bits": partial(convert_to, ConversionOptions(8)),
    "4 bits": partial(convert_to, ConversionOptions(4, "bfloat16")),
}


def harmless_cases() -> Iterator[tuple[str, str, str]]:
    """Yield name, kind of folder and what is done to the records, three of each in turn."""
    kinds = tuple(FOLDERS)
    for number, name in enumerate(HARMLESS):
        for turn in range(3):
            kind = kinds[(number + turn) % len(kinds)]
            yield name, kind, RECORDS[(number + 2 * turn) % len(RECORDS)]
