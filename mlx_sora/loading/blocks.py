"""Loading of a network block by block.

`split_blocks` checks all tensors and fills the network except for its blocks. `BlockSource` then
loads the weights of one block in any thread, assigns them to the network and clears them again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
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
    FP8,
    Reader,
    TensorInfo,
    load_tensors,
    memory_dtype,
)
from mlx_sora.models.key_map import KeyMap
from mlx_sora.models.quantized import QUANTIZED_SLICE_BYTES
from mlx_sora.runtime.device import explain_device_error

Block = TypeVar("Block")

#: Tensors that are read while others are cast to the type of the run: this many bytes as stored, or
#: one larger tensor.
CAST_BYTES = 48 << 20


@dataclass(frozen=True)
class BlockSource(Generic[Block]):
    """The blocks of `network`, which hold no weights until `assign` sets them.

    name: of the network, for messages. blocks: the objects that a block provider returns. entries:
    tensors of each block. dtype: of floats in memory. file_stats: the files when they were opened.
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
        """Size of each block in memory, in bytes."""
        return tuple(self.memory_bytes(block) for block in self.entries)

    @cached_property
    def disk_bytes(self) -> tuple[int, ...]:
        """Size of each block on disk, in bytes."""
        return tuple(self.stored_bytes(block) for block in self.entries)

    @cached_property
    def load_peak_bytes(self) -> int:
        """Peak memory of loading one block, in bytes: the block and the tensors being cast."""
        return max(self.nbytes) + max(map(self._extra_read_bytes, self.entries))

    def memory_bytes(self, entries: Iterable[Entry]) -> int:
        """Return the size of tensors in memory, in bytes."""
        return sum(prod(e.parameter.shape) * self._dtype(e).size for e in entries)

    def stored_bytes(self, entries: Iterable[Entry]) -> int:
        """Return the size of tensors on disk, in bytes."""
        return sum(self.tensors[entry.key].nbytes for entry in entries)

    def load(self, index: int, stream: mx.Stream | None = None) -> dict[str, mx.array]:
        """Return the weights of block `index` by parameter path, cast and evaluated.

        stream: a CPU stream; None means the default of the calling thread. Failing reads are tried
        again. Raises WeightsError that names the block and the file.
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
                message = f"Block {index} of the {self.name}: {error.message}"
                raise WeightsError(message, error.fix) from error
            except (OSError, RuntimeError) as error:
                if explain_device_error(error, "") is not None:  # not the file's fault
                    raise
                message = f"Block {index} of the {self.name}: cannot read {file}: {error}"
                raise WeightsError(message, FIX) from error
        return weights

    def assign(self, index: int, weights: Mapping[str, mx.array]) -> None:
        """Assign the weights of block `index` to the network."""
        assert len(weights) == len(self.entries[index])
        self.network.update(tree_unflatten(list(weights.items())))

    def clear(self, index: int) -> None:
        """Replace the weights of block `index` by empty arrays, so that using them is an error."""
        empty = mx.array([], dtype=self.dtype)
        paths = [entry.parameter.path for entry in self.entries[index]]
        self.network.update(tree_unflatten([(path, empty) for path in paths]))

    def _dtype(self, entry: Entry) -> mx.Dtype:
        return memory_dtype(self.tensors[entry.key].dtype, entry.parameter.memory_dtype(self.dtype))

    def _extra_read_bytes(self, entries: Sequence[Entry]) -> int:
        """Return the bytes that reading tensors takes beside their final form."""
        casts, quantized = [0], [0]
        for entry in entries:
            info = self.tensors[entry.key]
            if info.dtype in FLOATS:
                casts.append(self._cast_bytes(entry))
            elif info.nbytes > prod(info.shape) * mx.uint32.size:
                # Quantized on load: read in full, and a copy of it may become float32.
                quantized.append(3 * info.nbytes + QUANTIZED_SLICE_BYTES)
        return max(min(sum(casts), max(CAST_BYTES, *casts)), *quantized)

    def _cast_bytes(self, entry: Entry) -> int:
        """Return the bytes of the forms of a tensor of floats before its last."""
        info = self.tensors[entry.key]
        steps = (FLOATS[info.dtype] != self._dtype(entry)) + entry.parameter.transposed
        if info.dtype == FP8:  # which becomes bfloat16 first
            return info.nbytes * (1 + 2 * steps)
        return info.nbytes * steps

    def _load_from_file(
        self, file: Path, entries: Sequence[Entry], stream: mx.Stream | None
    ) -> dict[str, mx.array]:
        if FileStat.from_path(file) != self.file_stats[file]:
            raise WeightsError(f"{file} has changed since it was opened.", "Try again.")
        arrays = self.reader(file, {e.key: self.tensors[e.key] for e in entries}, stream)
        weights: dict[str, mx.array] = {}
        casting: deque[tuple[mx.array, int]] = deque()
        for entry in entries:
            array = entry.parameter.convert(arrays.pop(entry.key), stream)
            cast = array.astype(self._dtype(entry), stream=stream)
            weights[entry.parameter.path] = cast
            held = array.nbytes * ((cast.dtype != array.dtype) + entry.parameter.transposed)
            if held:
                while casting and held + sum(n for _, n in casting) > CAST_BYTES:
                    mx.eval(casting.popleft()[0])
                mx.async_eval(cast)
                casting.append((cast, held))
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
    """Load `network` except for its `blocks`, and return the source of those.

    blocks: in order, from the prefixes of a block's parameter paths to the object that a provider
    returns for it. The whole network is matched first; skip_keys: see `match_keys`.
    """
    owner = {prefix: i for i, prefixes in enumerate(blocks) for prefix in prefixes}
    entries: list[list[Entry]] = [[] for _ in blocks]
    others: list[Entry] = []
    for entry in match_keys(network, checkpoint, keys, skip_keys):
        path = entry.parameter.path
        found = next((i for prefix, i in owner.items() if path.startswith(prefix)), None)
        (others if found is None else entries[found]).append(entry)
    assign(network, checkpoint.load(entry.key for entry in others), others, dtype)
    files = {checkpoint.tensors[entry.key].file for block in entries for entry in block}
    source = BlockSource(
        name=name,
        network=network,
        blocks=tuple(blocks.values()),
        entries=entries,
        non_block_entries=others,
        tensors=checkpoint.tensors,
        dtype=dtype,
        reader=checkpoint.reader,
        file_stats={file: FileStat.from_path(file) for file in files},
    )
    for index in range(len(source)):
        source.clear(index)
    return source
