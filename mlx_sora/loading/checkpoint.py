"""Strict, lazy weight files: one safetensors file, or shards with an index.

Opening reads headers only. `match_keys` compares them with a module and accepts only an exact match
of names, shapes and types. `load_weights` then assigns the tensors, which MLX reads when it first
evaluates a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_sora.errors import WeightsError
from mlx_sora.loading.safetensors import (
    CODES,
    FIX,
    FLOATS,
    Reader,
    TensorInfo,
    load_tensors,
    read_header,
    read_rows,
)
from mlx_sora.models.key_map import KeyMap, Parameter, Shape
from mlx_sora.utils.files import visible_files
from mlx_sora.utils.json import read_object

#: Formats that can run code when they are opened. They are refused.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".npy", ".npz")

#: Longest name of a shard, in characters.
MAX_NAME = 200

#: Name in messages for weights that come from no file.
IN_MEMORY = "the weights in memory"


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors on disk. path: the file or folder opened; reader: loads tensors of one file."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    reader: Reader = load_tensors

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a .safetensors file, an index .json, or a folder with one of them.

        Raises WeightsError for missing, damaged, truncated or ambiguous files.
        """
        path = Path(path)
        file = _main_file(path)
        return cls(path, _read_index(file) if file.suffix == ".json" else read_header(file))

    @property
    def nbytes(self) -> int:
        """Size on disk of all tensors, in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    def load(self, keys: Iterable[str]) -> dict[str, mx.array]:
        """Return the named tensors: lazy with the default reader."""
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.tensors[key].file, []).append(key)
        out: dict[str, mx.array] = {}
        for file, names in by_file.items():
            out |= self.reader(file, {name: self.tensors[name] for name in names})
        return out

    def read_rows(
        self, key: str, rows: Sequence[int], types: Sequence[str] = tuple(FLOATS)
    ) -> mx.array:
        """Return rows of the 2-D tensor `key`, [len(rows), columns]. Reads nothing else.

        types: type codes that the tensor may have.
        """
        info = self.tensors.get(key)
        if info is None:
            raise WeightsError(f"{self.path} has no tensor {key}.", FIX)
        if info.dtype not in types:
            raise _type_error(key, info, types)
        if len(info.shape) != 2:
            raise WeightsError(f"{info.file}: {key} is {list(info.shape)}, not a table.", FIX)
        outside = [row for row in rows if not 0 <= row < info.shape[0]]
        if outside:
            raise WeightsError(
                f"{info.file}: {key} has {info.shape[0]} rows, but a token has id {outside[0]}.",
                "Text encoder and tokenizer do not belong together; use those of one model.",
            )
        return read_rows(info, rows)


def _main_file(path: Path) -> Path:
    """Return `path` itself, or the only index or the only .safetensors file in it."""
    if path.is_file():
        if path.suffix not in (".safetensors", ".json"):
            raise _not_safetensors_error(path)
        return path
    if not path.is_dir():
        raise WeightsError(f"No weights at {path}.", "Check the path of the model.")
    for pattern in ("*.safetensors.index*.json", "*.safetensors"):
        plain = plain_names([file.name for file in visible_files(path, pattern)])
        found = [path / name for name in plain]
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            names = ", ".join(f.name for f in found[:4])
            raise WeightsError(
                f"{path} holds several candidates ({names}) and no single index.",
                "Keep one model.safetensors, or the shards with their index.",
            )
    pickles = sorted(file for file in path.iterdir() if file.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise _not_safetensors_error(pickles[0])
    raise WeightsError(f"No .safetensors file in {path}.", "Check the path of the model.")


def plain_names(names: Sequence[str]) -> list[str]:
    """Return `names` of weights or indexes without variants and copies of other ones.

    model.fp16.safetensors, model copy.safetensors and model (1).safetensors count only where there
    is no model.safetensors. Shards are no variants.
    """
    stems = {name: _stem(name) for name in names}

    def is_variant(stem: str) -> bool:
        return any(re.match(re.escape(other) + r"[. (]", stem) for other in stems.values())

    return [name for name, stem in stems.items() if not is_variant(stem)]


def _stem(name: str) -> str:
    return name.removesuffix(".json").replace(".safetensors.index", "").removesuffix(".safetensors")


def _not_safetensors_error(path: Path) -> WeightsError:
    return WeightsError(
        f"{path} is not a safetensors file.",
        "Pickled checkpoints (.bin, .pt, .ckpt) are never opened, because that would run the code "
        "in them; use a safetensors copy.",
    )


def _read_index(index: Path) -> dict[str, TensorInfo]:
    """Return the tensors of all shards, checked against the index."""
    try:
        weight_map = read_object(index)["weight_map"]
        files = {str(key): str(name) for key, name in weight_map.items()}
    except OSError as error:
        raise WeightsError(f"Cannot read {index}: {error.strerror}.", FIX) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not a valid index (no weight_map).", FIX) from error
    headers = {name: read_header(_shard_path(index, name)) for name in sorted(set(files.values()))}
    for key, name in files.items():
        if key not in headers[name]:
            raise WeightsError(f"{index} places {key} in {name}, which does not hold it.", FIX)
    extra = [(k, n) for n, header in headers.items() for k in header if files.get(k) != n]
    if extra:
        raise WeightsError(f"{extra[0][1]} holds {extra[0][0]}, which {index} does not list.", FIX)
    return {key: headers[name][key] for key, name in files.items()}


def _shard_path(index: Path, name: str) -> Path:
    """Return the shard `name` beside `index`. Raises WeightsError if it leads out of the folder."""
    path = index.parent / name
    if Path(name).name != name or not name.isprintable() or len(name) > MAX_NAME:
        raise WeightsError(f"{index} names a file outside its folder: {name}.", FIX)
    if path.suffix != ".safetensors":
        raise _not_safetensors_error(path)
    if not path.is_file():
        raise WeightsError(f"{index} names {name}, which is missing.", FIX)
    # In the hub's cache, index and shards are links to files of one other folder.
    if path.resolve().parent not in (index.parent.resolve(), index.resolve().parent):
        raise WeightsError(
            f"{path} is a link that leaves the folder of its index.", "Copy the file itself there."
        )
    return path


@dataclass(frozen=True)
class Entry:
    """Tensor `key` of a checkpoint and the parameter that it fills."""

    key: str
    parameter: Parameter


def match_keys(
    module: nn.Module,
    checkpoint: Checkpoint | Mapping[str, mx.array],
    keys: KeyMap,
    skip_keys: Sequence[str] = (),
) -> list[Entry]:
    """Match every tensor to a parameter of `module`, by name, shape and type.

    skip_keys: tensors that the caller reads itself (an embedding table, by rows).
    Raises WeightsError that names file, key, expected and found, also for leftovers.
    """
    parameters: list[tuple[str, mx.array]] = tree_flatten(module.parameters())  # type: ignore[assignment]
    expected = {path: (tuple(value.shape), value.dtype) for path, value in parameters}
    where = str(checkpoint.path) if isinstance(checkpoint, Checkpoint) else IN_MEMORY
    entries: dict[str, Entry] = {}
    for key, info in _headers(checkpoint).items():
        parameter = None if key in skip_keys else keys.find_parameter(key, info.shape)
        if parameter is None:
            continue
        _check_fit(key, info, parameter, expected)
        if parameter.path in entries:
            raise WeightsError(f"{where}: {key} is a second copy of {parameter.path}.", FIX)
        entries[parameter.path] = Entry(key, parameter)
    missing = [path for path in expected if path not in entries and path not in keys.optional]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        shape = list(expected[missing[0]][0])
        raise WeightsError(f"{where}: missing tensor {missing[0]} {shape}{more}.", FIX)
    return list(entries.values())


def assign(
    module: nn.Module,
    arrays: Mapping[str, mx.array],
    entries: Iterable[Entry],
    dtype: mx.Dtype | None = None,
) -> None:
    """Assign tensors to the parameters of `entries`; all lazy.

    dtype: of floats, except for those that are float32 in every run; None keeps the stored types.
    """
    values = []
    for entry in entries:
        value = entry.parameter.convert(arrays[entry.key])
        if dtype is not None and mx.issubdtype(value.dtype, mx.floating):
            value = value.astype(entry.parameter.memory_dtype(dtype))
        values.append((entry.parameter.path, value))
    module.update(tree_unflatten(values))


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint | Mapping[str, mx.array],
    keys: KeyMap,
    *,
    dtype: mx.Dtype | None = None,
    skip_keys: Sequence[str] = (),
) -> None:
    """Match and assign a tensor to every parameter of `module`; see `match_keys`.

    checkpoint: from disk (stays lazy), or a dict of arrays.
    dtype: of floating parameters; see `assign`.
    """
    entries = match_keys(module, checkpoint, keys, skip_keys)
    if isinstance(checkpoint, Checkpoint):
        checkpoint = checkpoint.load(entry.key for entry in entries)
    assign(module, checkpoint, entries, dtype)


def _headers(checkpoint: Checkpoint | Mapping[str, mx.array]) -> Mapping[str, TensorInfo]:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint.tensors
    codes = {dtype: code for code, dtype in (FLOATS | CODES).items()}
    return {
        key: TensorInfo(Path(IN_MEMORY), codes.get(a.dtype, str(a.dtype)), a.shape, 0, a.nbytes)
        for key, a in checkpoint.items()
    }


def _check_fit(
    key: str, info: TensorInfo, parameter: Parameter, expected: Mapping[str, tuple[Shape, mx.Dtype]]
) -> None:
    if parameter.path not in expected:
        raise WeightsError(
            f"{info.file}: unexpected tensor {key} {list(info.shape)}.",
            "The file belongs to another model or configuration.",
        )
    shape, dtype = expected[parameter.path]
    if parameter.shape != shape:
        raise WeightsError(
            f"{info.file}: {key} has shape {list(parameter.shape)}, expected {list(shape)}.",
            "The file and its config.json do not belong together.",
        )
    types = [code for code, kind in CODES.items() if kind == dtype] or list(FLOATS)
    if info.dtype not in types:
        raise _type_error(key, info, types)


def _type_error(key: str, info: TensorInfo, types: Sequence[str]) -> WeightsError:
    return WeightsError(
        f"{info.file}: {key} has type {info.dtype}, expected {' or '.join(types)}.",
        "Get the model in one of these types, and quantize it here: --quantize or convert.",
    )
