"""Readers of model folders, each as a function of bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from tests.fuzz import samples, second


def safetensors(data: bytes, folder: Path) -> None:
    """Header and data of a file, then the tensors themselves by MLX."""
    import mlx.core as mx
    import numpy as np

    from mlx_sora.loading.safetensors import load_tensors, read_header, read_rows

    path = folder / "model.safetensors"
    path.write_bytes(data)
    tensors = read_header(path)
    contents = second.safetensors_file(data, tensors)
    arrays = load_tensors(path, tensors)
    for key, info in tensors.items():
        if info.dtype in ("F32", "BF16", "U32"):
            loaded = np.array(arrays[key].view(mx.uint8)) if info.nbytes and info.shape else None
            if loaded is not None:
                second.agree(f"content of {key}", loaded.tobytes(), contents[key])
        if info.dtype == "F32" and len(info.shape) == 2 and min(info.shape) > 0:
            read_rows(info, [0, info.shape[0] - 1])


def header(data: bytes, folder: Path) -> None:
    """As `_safetensors`, `data` being the header alone, of 96 bytes of tensors."""
    safetensors(struct.pack("<Q", len(data)) + data + bytes(96), folder)


def index(data: bytes, folder: Path) -> None:
    from mlx_sora.loading.checkpoint import Checkpoint

    for name, content in samples.shards().items():
        (folder / name).write_bytes(content)
    (folder / "model.safetensors.index.json").write_bytes(data)
    second.index_file(data, Checkpoint.open(folder).tensors, samples.shards())


@cache
def _model(folder: Path) -> Path:
    """A copy of the bundled model, by links, but for its small files."""
    from mlx_sora.loading.model_folder import BUNDLED, find_model

    source = find_model(BUNDLED).path
    for path in source.rglob("*"):
        place = folder / "model" / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            if path.suffix == ".json":
                place.write_bytes(path.read_bytes())
            else:
                place.symlink_to(path)
    return folder / "model"


def _config_class(part: str) -> Any:
    from mlx_sora.models.stdit3 import STDiT3Config
    from mlx_sora.models.t5 import T5Config
    from mlx_sora.models.vae import VAEConfig

    return {"transformer": STDiT3Config, "text_encoder": T5Config, "vae": VAEConfig}[part]


def config(part: str) -> Callable[[bytes, Path], None]:
    """config.json of a part, against the weights of the bundled model."""

    def run(data: bytes, folder: Path) -> None:
        from mlx_sora.loading import networks
        from mlx_sora.loading.checkpoint import Checkpoint
        from mlx_sora.loading.model_folder import Defaults, ModelFolder

        path = _model(folder)
        (path / part / "config.json").write_bytes(data)
        model = ModelFolder(path, "fuzzed", Defaults())
        networks.match_part(model, part, Checkpoint.open(path / part))
        values = json.loads(data)
        if part == "vae":
            _spell_out_vae(values)
        found = _config_class(part).from_dict(values)
        second.same_values(part, found, values)
        _load(model, part, found)

    return run


def _spell_out_vae(values: dict[str, Any]) -> None:
    """Write the shorter forms of the VAE's configuration as the longer ones."""
    # The spatial part has a number of its own, which counts.
    own = (values.get("vae_2d") or {}).get("micro_batch_size", values.get("micro_batch_size", 4))
    values["micro_batch_size"] = own
    for name in ("shift", "scale"):
        if isinstance(values.get(name), float | int):
            values[name] = [values[name]] * 4


@lru_cache(256)
def _load(model: Any, part: str, config: Any) -> None:
    """Build a network, once for each configuration."""
    import mlx.core as mx

    from mlx_sora.loading import networks

    if part == "vae":
        networks.load_vae(model)
    elif part == "transformer":
        networks.stream_transformer(model, mx.float32)
    else:
        networks.stream_text_encoder(model, mx.float32)


def model_index(data: bytes, folder: Path) -> None:
    from mlx_sora.geometry import Size
    from mlx_sora.loading.model_folder import ModelFolder
    from mlx_sora.pipeline.settings import resolve
    from mlx_sora.request.generation import GenerationRequest

    path = _model(folder)
    (path / "model_index.json").write_bytes(data)
    request = GenerationRequest(prompt="a cat", seed=1)
    model = ModelFolder.open(path)
    resolve(request, model)
    list(model.card.mismatches({"the prompt": "a cat"}, "fog", Size(64, 64), 17))
    second.same_values("defaults", model.defaults, json.loads(data).get("defaults", {}))
    resolve(request, model)


def provenance(data: bytes, folder: Path) -> None:
    from mlx_sora.manage.doctor import repair_command
    from mlx_sora.manage.provenance import FILE, Provenance

    (folder / FILE).write_bytes(data)
    repair_command(folder)
    found = Provenance.read(folder)
    if found is not None:
        second.same_values("provenance", replace(found, files={}), _but(json.loads(data), "files"))
        for name, row in json.loads(data)["files"].items():
            second.same_values(name, found.files[name], row)
        found.damaged_files(folder)


def statistics(data: bytes, folder: Path) -> None:
    from mlx_sora.manage.statistics import FILE, SUMS, Statistics, TensorStatistics

    (folder / FILE).write_bytes(data)
    found = Statistics.read(folder)
    assert found is not None
    content = json.loads(data)
    second.agree("settings", dict(found.settings), content["settings"])
    row = TensorStatistics("F32", (2, 2), 1.5, 2.0, 0, (1.0,) * SUMS)
    for part, rows in found.tensors.items():
        for name, other in rows.items():
            second.same_values(name, other, content["tensors"][part][name])
            row.difference(other)


def _but(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def tokenizer_model(data: bytes, folder: Path) -> None:
    from mlx_sora.text.tokenizer import Tokenizer

    path = folder / "spiece.model"
    path.write_bytes(data)
    tokenizer = Tokenizer.load(path)
    text = "a red circle, moving right! </s> <extra_id_3> \u00e9t\u00e9 \uff1cpad\uff1e"
    outside = [i for i in tokenizer.encode(text).ids if not 0 <= i < tokenizer.vocab_size]
    second.agree("ids beyond the vocabulary", outside, [])
