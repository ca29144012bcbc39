"""A network's weights block by block: what belongs to each, checked before any of it is read.

The network stands there without its blocks' weights. `BlockSource` reads those of one block, in
whatever thread asks, puts them into the network, and takes them away again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Generic, TypeVar

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

from mlx_sora.errors import WeightsError
from mlx_sora.loading.checkpoint import Checkpoint, Entry, assign, match_keys
from mlx_sora.loading.file_guard import FileStat, retry_read
from mlx_sora.loading.safetensors import (
    FIX,
    FLOATS,
    Reader,
    TensorInfo,
    load_tensors,
    memory_dtype,
)
from mlx_sora.models.key_map import KeyMap
from mlx_sora.runtime.device import known_error

Block = TypeVar("Block")


@dataclass(frozen=True)
class BlockSource(Generic[Block]):
    """The blocks of `network`, which hold no weights until `put` brings them.

    name: of the network, for messages. blocks: what a provider hands out. entries: the tensors of
    each block; rest: those of the network that are in no block. dtype: what floats are cast to as
    they are read. stamps: the files as first seen.
    """

    name: str
    network: nn.Module
    blocks: Sequence[Block]
    entries: Sequence[Sequence[Entry]]
    non_block_entries: Sequence[Entry]
    tensors: Mapping[str, TensorInfo]
    dtype: mx.Dtype
    file_stats: Mapping[Path, FileStat]
    reader: Reader = load_tensors

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def nbytes(self) -> tuple[int, ...]:
        """Bytes of each block in memory."""
        return tuple(self._memory_bytes(block) for block in self.entries)

    @cached_property
    def non_block_bytes(self) -> int:
        """Bytes in memory of what is in no block."""
        return self._memory_bytes(self.non_block_entries)

    @cached_property
    def disk_bytes(self) -> tuple[int, ...]:
        """Bytes of each block on disk."""
        return tuple(self._disk_bytes(block) for block in self.entries)

    @cached_property
    def non_block_disk_bytes(self) -> int:
        """Bytes on disk of what is in no block."""
        return self._disk_bytes(self.non_block_entries)

    @cached_property
    def load_peak_bytes(self) -> int:
        """The most memory that loading one block takes: itself, and one tensor as it is stored."""
        infos = [self.tensors[entry.key] for block in self.entries for entry in block]
        return max(self.nbytes) + max(self._extra_read_bytes(info) for info in infos)

    def load(self, index: int, stream: mx.Stream | None = None) -> dict[str, mx.array]:
        """Weights of block `index` by parameter path, cast and evaluated in the calling thread.

        stream: a CPU stream to work on; None is the thread's own. A read that fails is tried again.
        Raises WeightsError that names the block and the file.
        """
        files: dict[Path, list[Entry]] = {}
        for entry in self.entries[index]:
            files.setdefault(self.tensors[entry.key].file, []).append(entry)
        weights: dict[str, mx.array] = {}
        for file, entries in files.items():
            try:
                load = partial(self._load_from_file, file, entries, stream)
                weights |= retry_read(load, f"block {index} of the {self.name} from {file}")
            except WeightsError as error:
                raise WeightsError(self._fault(index, error.message), error.fix) from error
            except (OSError, RuntimeError) as error:
                if known_error(error, "") is not None:  # of memory, not of the file
                    raise
                raise WeightsError(
                    self._fault(index, f"cannot read {file}: {error}"), FIX
                ) from error
        return weights

    def assign(self, index: int, weights: Mapping[str, mx.array]) -> None:
        """Give block `index` its weights."""
        assert len(weights) == len(self.entries[index])
        self.network.update(tree_unflatten(list(weights.items())))

    def clear(self, index: int) -> None:
        """Take the weights of block `index` away.

        Its parameters become empty arrays, so that using it before the next `put` is an error and
        never a silent result.
        """
        empty = mx.array([], dtype=self.dtype)
        paths = [entry.parameter.path for entry in self.entries[index]]
        self.network.update(tree_unflatten([(path, empty) for path in paths]))

    def _extra_read_bytes(self, info: TensorInfo) -> int:
        """Bytes of a tensor as it is read, where that is not what stays."""
        if info.dtype in FLOATS:
            return info.nbytes if FLOATS[info.dtype][1] != self.dtype else 0
        # What is quantised on the way is read whole, and a copy of it may become float32.
        return 3 * info.nbytes if info.nbytes > prod(info.shape) * mx.uint32.size else 0

    def _memory_bytes(self, entries: Sequence[Entry]) -> int:
        return sum(
            prod(entry.parameter.shape)
            * memory_dtype(self.tensors[entry.key].dtype, self.dtype).size
            for entry in entries
        )

    def _disk_bytes(self, entries: Sequence[Entry]) -> int:
        return sum(self.tensors[entry.key].nbytes for entry in entries)

    def _fault(self, index: int, message: str) -> str:
        return f"Block {index} of the {self.name}: {message}"

    def _load_from_file(
        self, file: Path, entries: Sequence[Entry], stream: mx.Stream | None
    ) -> dict[str, mx.array]:
        if FileStat.from_path(file) != self.file_stats[file]:
            raise WeightsError(f"{file} has changed since it was opened.", "Try again.")
        arrays = self.reader(file, {e.key: self.tensors[e.key] for e in entries}, stream)
        types = {key: memory_dtype(self.tensors[key].dtype, self.dtype) for key in arrays}
        casting = any(array.dtype != types[key] for key, array in arrays.items())
        weights: dict[str, mx.array] = {}
        for entry in entries:
            array = entry.parameter.convert(arrays.pop(entry.key))
            array = array.astype(types[entry.key], stream=stream)
            weights[entry.parameter.path] = array
            if casting:  # one after the other, so that only one is in memory in both types
                mx.eval(array)
        mx.eval(weights)
        return weights


def split_blocks(
    name: str,
    network: nn.Module,
    blocks: Mapping[tuple[str, ...], Block],
    checkpoint: Checkpoint,
    keys: KeyMap,
    *,
    dtype: mx.Dtype,
    skip_keys: Sequence[str] = (),
) -> BlockSource[Block]:
    """Fill all of `network` but its `blocks`, and return where those come from.

    blocks: for the prefixes of a block's parameter paths, what a provider hands out for it, in
    order. The whole network is matched first, as `fill` would; `without` as there.
    """
    owner = {prefix: i for i, prefixes in enumerate(blocks) for prefix in prefixes}
    parts: list[list[Entry]] = [[] for _ in blocks]
    rest: list[Entry] = []
    for entry in match_keys(network, checkpoint, keys, skip_keys):
        path = entry.parameter.path
        found = next((i for prefix, i in owner.items() if path.startswith(prefix)), None)
        (rest if found is None else parts[found]).append(entry)
    assign(network, checkpoint.load(entry.key for entry in rest), rest, dtype)
    files = {checkpoint.tensors[entry.key].file for part in parts for entry in part}
    source = BlockSource(
        name=name,
        network=network,
        blocks=tuple(blocks.values()),
        entries=tuple(tuple(part) for part in parts),
        non_block_entries=tuple(rest),
        tensors=checkpoint.tensors,
        dtype=dtype,
        reader=checkpoint.reader,
        file_stats={file: FileStat.from_path(file) for file in files},
    )
    for index in range(len(source)):
        source.clear(index)
    return source
