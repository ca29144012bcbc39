"""Changes of a model folder that change its videos, and harmless ones, for trying the doctor.

A case is one change in one kind of folder (the bundled model, or a conversion of it) whose records
the attacker left, removed, or made right again: `resign` renews the checksums, `forge` all records.
"""

from __future__ import annotations

import json
import shutil
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import BUNDLED, bundled_folder, find_model
from mlx_sora.loading.quantization import packed_names
from mlx_sora.manage import provenance, statistics
from mlx_sora.manage.conversion_plan import ConversionOptions
from mlx_sora.manage.convert import convert
from mlx_sora.manage.provenance import FileOrigin, Provenance
from mlx_sora.manage.statistics import Statistics
from mlx_sora.models.quantized import Quantization
from mlx_sora.utils.files import sha256

Random = np.random.Generator
Change = Callable[[Path, Random], None]

#: Kinds of folders; None is the bundled model itself.
FOLDERS: dict[str, ConversionOptions | None] = {
    "bundled": None,
    "8-bit": ConversionOptions(8),
    "4-bit": ConversionOptions(4),
    "bfloat16": ConversionOptions(dtype="bfloat16"),
}

#: What the attacker does to the records.
RECORDS = ("left", "removed", "resigned", "forged")

QUICK = {"steps": 4}
DEFAULT: dict[str, Any] = {}


def write_folder(kind: str, target: Path) -> Path:
    """A healthy folder of this kind."""
    options = FOLDERS[kind]
    if options is None:
        shutil.copytree(bundled_folder(), target)
    else:
        convert(find_model(BUNDLED), target, options)
    return target


def tamper_records(model: Path, how: str) -> None:
    """Do to the records what `how` says."""
    if how == "removed":
        for name in statistics.RECORDS:
            (model / name).unlink(missing_ok=True)
    if how == "forged":
        Statistics.measure(model).write(model)
    if how in ("resigned", "forged"):
        resign(model)


def resign(model: Path) -> None:
    """Renew the checksums of what is there."""
    old = Provenance.read(model)
    assert old is not None
    names = [p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file()]
    files = {
        name: FileOrigin("a/b", "", name, (model / name).stat().st_size, sha256(model / name))
        for name in names
        if name not in (provenance.FILE, statistics.FILE)
    }
    Provenance(old.model, old.endpoint, files, old.conversion).write(model)


def stored(model: Path, part: str, name: str) -> tuple[str, ...]:
    """Names of the tensors that hold the weight: three if it is packed."""
    tensors = Checkpoint.open(model / part).tensors
    return packed_names(name, Quantization(8)) if tensors[name].dtype == "U32" else (name,)


def edit(model: Path, part: str, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change a stored tensor in its place: floats as float32, packed words as they are."""
    info = Checkpoint.open(model / part).tensors[name]
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4"}
    with info.file.open("r+b") as file:
        file.seek(info.offset)
        raw = np.frombuffer(file.read(info.nbytes), kinds[info.dtype])
        if info.dtype == "BF16":
            values = (raw.astype("<u4") << 16).view("<f4")
        else:
            values = raw if info.dtype == "U32" else raw.astype("<f4")
        new = change(values.reshape(info.shape).copy())
        if info.dtype == "BF16":
            new = (new.astype("<f4").view("<u4") >> 16).astype("<u2")
        file.seek(info.offset)
        file.write(np.ascontiguousarray(new.astype(kinds[info.dtype])).tobytes())


def scale(part: str, name: str, factor: float) -> Change:
    def change(model: Path, random: Random) -> None:
        names = stored(model, part, name)
        for each in names[1:] or names:
            edit(model, part, each, lambda x: x * np.float32(factor))

    return change


def each_row(part: str, name: str, order: Callable[[int, Random], np.ndarray]) -> Change:
    """Reorder the rows of a weight, packed or not."""

    def change(model: Path, random: Random) -> None:
        names = stored(model, part, name)
        count = Checkpoint.open(model / part).tensors[name].shape[0]
        rows = order(count, random)
        for each in names:
            edit(model, part, each, lambda x: x[rows])

    return change


def shuffle(part: str, name: str) -> Change:
    return each_row(part, name, lambda count, random: random.permutation(count))


def repeat_first(part: str, name: str) -> Change:
    return each_row(part, name, lambda count, _: np.zeros(count, int))


def zero_rows(part: str, name: str) -> Change:
    def change(model: Path, random: Random) -> None:
        names = stored(model, part, name)
        for each in names[1:] or names:
            edit(
                model,
                part,
                each,
                lambda x: np.concatenate([x[: len(x) // 2], 0 * x[len(x) // 2 :]]),
            )

    return change


def swap(part: str, first: str, second: str) -> Change:
    def change(model: Path, random: Random) -> None:
        tensors = Checkpoint.open(model / part).tensors
        for names in zip(stored(model, part, first), stored(model, part, second), strict=True):
            infos = [tensors[name] for name in names]
            contents = [i.file.read_bytes()[i.offset : i.offset + i.nbytes] for i in infos]
            for info, content in zip(infos, reversed(contents), strict=True):
                with info.file.open("r+b") as file:
                    file.seek(info.offset)
                    file.write(content)

    return change


def flip_bytes(part: str, name: str, count: int = 200) -> Change:
    """Flip the highest bit of the magnitude, or of a code, in some places."""

    def change(model: Path, random: Random) -> None:
        info = Checkpoint.open(model / part).tensors[name]
        width = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4}[info.dtype]
        data = bytearray(info.file.read_bytes())
        places = random.choice(info.nbytes // width, min(count, info.nbytes // width), False)
        for place in places:
            data[info.offset + int(place) * width + width - 1] ^= 0x0C
        info.file.write_bytes(data)

    return change


def add_noise(part: str, name: str, share: float) -> Change:
    def change(model: Path, random: Random) -> None:
        def noisy(x: np.ndarray) -> np.ndarray:
            noise = random.standard_normal(x.shape).astype("<f4")
            return x + noise * np.float32(share * np.sqrt(np.square(x).mean()))

        names = stored(model, part, name)
        for each in names[1:] or names:
            edit(model, part, each, noisy)

    return change


def set_value(name: str, path: str, value: Any) -> Change:
    """Set a value of a JSON file; `path` has dots between the keys."""

    def change(model: Path, random: Random) -> None:
        content = json.loads((model / name).read_text())
        *outer, last = path.split(".")
        inner = content
        for key in outer:
            inner = inner[key]
        inner[last] = value
        (model / name).write_text(json.dumps(content, indent=2))

    return change


def change_preview(model: Path, random: Random) -> None:
    content = json.loads((model / "preview.json").read_text())
    weights = content["layers"][-1][0]
    values = np.frombuffer(b64decode(weights["float16"]), "<f2")
    weights["float16"] = b64encode((-0.5 * values).astype("<f2").tobytes()).decode()
    (model / "preview.json").write_text(json.dumps(content))


def change_table(model: Path, random: Random) -> None:
    file = next((model / "step_cache").glob("*.json"))
    content = json.loads(file.read_text())
    for paths in content["orders"].values():
        for count in paths:
            paths[count] = list(range(int(count)))
    file.write_text(json.dumps(content))


def swap_pieces(first: str, second: str) -> Change:
    """Swap two pieces of the vocabulary that have as many bytes."""

    def change(model: Path, random: Random) -> None:
        file = model / "tokenizer" / "spiece.model"
        a, b = (b"\n" + bytes([len(w.encode())]) + w.encode() for w in (first, second))
        data = file.read_bytes()
        assert data.count(a) == data.count(b) == 1
        start, end = sorted([data.index(a), data.index(b)])
        size, after = len(a), end + len(b)
        swapped = data[end:after] + data[start + size : end] + data[start : start + size]
        file.write_bytes(data[:start] + swapped + data[after:])

    return change


def other_model(part: str) -> Change:
    """Weights of another training: all matrices anew, of the same scale."""

    def change(model: Path, random: Random) -> None:
        tensors = Checkpoint.open(model / part).tensors
        for name, info in tensors.items():
            if info.dtype == "U32":
                edit(model, part, name, lambda x: random.integers(0, 2**32, x.shape, "<u4"))
            elif len(info.shape) > 1 and not name.endswith(("scales", "biases")):
                edit(model, part, name, lambda x: random.permutation(x.reshape(-1)))

    return change


@dataclass(frozen=True)
class Mutation:
    """A change that shows. options: of the request that shows it; kinds: of the folders with it."""

    name: str
    change: Change
    options: dict[str, Any] = field(default_factory=lambda: QUICK)
    kinds: tuple[str, ...] = tuple(FOLDERS)


_T, _X, _V = "transformer", "text_encoder", "vae"
_Q = ("8-bit", "4-bit")
_SPATIAL = "spatial_vae.module.decoder"
_BLOCK = "encoder.block.0.layer"

MUTATIONS = [
    Mutation("scaled", scale(_T, "spatial_blocks.1.attn.qkv.weight", 1.5)),
    Mutation("negated", scale(_T, "temporal_blocks.2.mlp.fc2.weight", -1)),
    Mutation("rows shuffled", shuffle(_T, "spatial_blocks.3.mlp.fc1.weight")),
    Mutation("rows repeated", repeat_first(_T, "spatial_blocks.2.cross_attn.q_linear.weight")),
    Mutation("rows zeroed", zero_rows(_T, "temporal_blocks.0.attn.proj.weight")),
    Mutation("swapped", swap(_T, *(f"spatial_blocks.{i}.mlp.fc2.weight" for i in (0, 3)))),
    Mutation("noise", add_noise(_T, "spatial_blocks.0.attn.proj.weight", 0.5)),
    Mutation("bytes flipped", flip_bytes(_T, "t_block.1.weight")),
    Mutation("time embedding", scale(_T, "t_embedder.mlp.2.weight", 1.3)),
    Mutation("patches shuffled", shuffle(_T, "x_embedder.proj.weight")),
    Mutation("null caption", scale(_T, "y_embedder.y_embedding", 8)),
    Mutation("rotation", scale(_T, "rope.freqs", 0.5)),
    Mutation("output bias", flip_bytes(_T, "final_layer.linear.bias", 8)),
    Mutation("modulation", scale(_T, "spatial_blocks.0.scale_shift_table", 1.4)),
    Mutation("other transformer", other_model(_T)),
    Mutation("token rows", shuffle(_X, "shared.weight")),
    Mutation("text attention", scale(_X, f"{_BLOCK}.0.SelfAttention.o.weight", -1)),
    Mutation(
        "text swapped", swap(_X, *(f"{_BLOCK}.1.DenseReluDense.wi_{i}.weight" for i in (0, 1)))
    ),
    Mutation("text norm", scale(_X, "encoder.final_layer_norm.weight", 3)),
    Mutation(
        "text bias", scale(_X, f"{_BLOCK}.0.SelfAttention.relative_attention_bias.weight", -3)
    ),
    Mutation("other text encoder", other_model(_X)),
    Mutation("decoder scaled", scale(_V, f"{_SPATIAL}.conv_out.weight", 0.8)),
    Mutation("decoder shuffled", shuffle(_V, f"{_SPATIAL}.up_blocks.0.resnets.0.conv1.weight")),
    Mutation("latent scale", scale(_V, "scale", 1.5)),
    Mutation("latent shift", scale(_V, "shift", -1)),
    Mutation("temporal bytes", flip_bytes(_V, "temporal_vae.decoder.conv1.conv.weight", 400)),
    Mutation("temporal zeroed", zero_rows(_V, "temporal_vae.decoder.conv_blocks.1.conv.weight")),
    Mutation("codes flipped", flip_bytes(_T, "spatial_blocks.0.mlp.fc1.weight", 4000), kinds=_Q),
    Mutation("scales", scale(_T, "spatial_blocks.0.attn.qkv.scales", 1.6), kinds=_Q),
    Mutation("scales swapped", shuffle(_T, "spatial_blocks.1.mlp.fc2.scales"), kinds=_Q),
    Mutation("zero points", scale(_T, "temporal_blocks.1.attn.qkv.biases", 0), kinds=_Q),
    Mutation("epsilon", set_value("text_encoder/config.json", "layer_norm_epsilon", 3.0)),
    Mutation(
        "distances", set_value("text_encoder/config.json", "relative_attention_max_distance", 9)
    ),
    Mutation("position scale", set_value("transformer/config.json", "input_sq_size", 64)),
    Mutation("patch size", set_value("transformer/config.json", "patch_size", [1, 4, 1])),
    Mutation("groups", set_value("vae/config.json", "spatial_config.norm_num_groups", 4)),
    Mutation("temporal groups", set_value("vae/config.json", "temporal_config.num_groups", 4)),
    Mutation("chunks", set_value("vae/config.json", "micro_frame_size", 8)),
    Mutation("guidance", set_value("model_index.json", "defaults.guidance", 7.0)),
    Mutation("steps", set_value("model_index.json", "defaults.steps", 3), DEFAULT),
    Mutation("rate", set_value("model_index.json", "defaults.fps", 8)),
    Mutation("pieces", swap_pieces("\u2581green", "\u2581white")),
    Mutation("preview", change_preview, {"preview_every": 2, **QUICK}, ("bundled",)),
    Mutation("table", change_table, {"step_cache": "table:8"}, ("bundled",)),
]


def cases() -> Iterator[tuple[Mutation, str, str]]:
    """Yield mutation, kind of folder and what is done to the records, about a hundred in turn."""
    for number, mutation in enumerate(MUTATIONS):
        kinds = mutation.kinds[number % 2 :: 2] or mutation.kinds
        for turn, kind in enumerate(kinds):
            yield mutation, kind, RECORDS[(number // 2 + turn) % len(RECORDS)]
