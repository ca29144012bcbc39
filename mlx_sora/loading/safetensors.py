"""Reading safetensors headers, and single rows, without reading the tensors.

`mx.load` is lazy but trusting: a truncated file fails only when a tensor is used, and an embedding
table is always read whole. Here the header is checked against the file before anything is loaded.
Format: 8 bytes little-endian header size, JSON header, data. Source: the safetensors specification.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_sora.errors import WeightsError

#: Bytes per element and MLX dtype of the floating types that weights come in.
FLOATS: dict[str, tuple[int, mx.Dtype]] = {
    "F32": (4, mx.float32),
    "F16": (2, mx.float16),
    "BF16": (2, mx.bfloat16),
}

#: Type of the words that quantised weights are packed into.
PACKED = "U32"

_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4} | dict.fromkeys(
    ("F16", "BF16", "I16", "U16"), 2
)
_SIZES |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1)

#: The specification's own bound on a header; a larger number means that this is another format.
MAX_HEADER = 100_000_000

FIX = "Download or copy the file again."


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `file`, dtype code, shape, first byte in the file, bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor table of a safetensors file, checked against the file's size.

    Raises WeightsError that names the file, and the tensor where one is at fault.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
            if length > min(MAX_HEADER, size - 8):
                raise WeightsError(f"{path} is not a whole safetensors file ({size} bytes).", FIX)
            header = json.loads(f.read(length))
    except OSError as error:
        raise WeightsError(
            f"Cannot read {path}: {error.strerror}.", "Check path and rights."
        ) from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has a damaged safetensors header.", FIX) from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path} has a damaged safetensors header.", FIX)
    header.pop("__metadata__", None)
    return {key: _tensor_info(path, size, 8 + length, key, row) for key, row in header.items()}


def _tensor_info(path: Path, size: int, base: int, key: str, row: Any) -> TensorInfo:
    try:
        dtype, shape = str(row["dtype"]), tuple(int(n) for n in row["shape"])
        begin, end = (int(n) for n in row["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(f"{path}: the header entry of {key} is damaged.", FIX) from error
    expected = prod(shape) * _SIZES.get(dtype, 0)
    if dtype not in _SIZES or min(shape, default=0) < 0 or begin < 0 or end - begin != expected:
        raise WeightsError(
            f"{path}: {key} is {dtype} {list(shape)}, which needs {expected} bytes, "
            f"but its entry spans {end - begin}.",
            FIX,
        )
    if base + end > size:
        raise WeightsError(
            f"{path} is truncated: {key} ends at byte {base + end}, the file at {size}.", FIX
        )
    return TensorInfo(path, dtype, shape, base + begin, expected)


def load_tensors(
    file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None = None
) -> dict[str, mx.array]:
    """The named tensors of one file as lazy arrays: bytes are read at their first evaluation.

    stream: where the reading runs; None is the calling thread's own. Raises WeightsError when the
    file is gone or no longer is what its header said.
    """
    try:
        arrays = mx.load(str(file), format="safetensors", stream=stream)
    except RuntimeError as error:
        raise WeightsError(f"MLX cannot load {file}: {error}", FIX) from error
    assert isinstance(arrays, dict)
    for key, info in tensors.items():
        array = arrays.get(key)
        if array is None or array.shape != info.shape or not _same_type(array, info):
            raise WeightsError(f"{file} has changed since it was opened (see {key}).", "Try again.")
    return {key: arrays[key] for key in tensors}


class Reader(Protocol):
    """How the tensors of a block come from a file; `load_tensors` is the plain one."""

    def __call__(
        self, file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None = None
    ) -> dict[str, mx.array]:
        """The named tensors, lazy on `stream` or evaluated, in a dict of the caller's own.

        Raises WeightsError, OSError or RuntimeError.
        """


def loaded_dtype(stored: str, dtype: mx.Dtype) -> mx.Dtype:
    """Type in memory of a tensor `stored` so, where floats are cast to `dtype`: words are not."""
    return mx.uint32 if stored == PACKED else dtype


def _same_type(array: mx.array, info: TensorInfo) -> bool:
    if info.dtype in FLOATS:
        return bool(array.dtype == FLOATS[info.dtype][1])
    return info.dtype != PACKED or array.dtype == mx.uint32


def read_rows(info: TensorInfo, rows: Sequence[int]) -> mx.array:
    """The given rows of a 2-D tensor, [len(rows), columns], reading only their bytes."""
    import numpy as np

    width, dtype = FLOATS[info.dtype]
    stride = info.shape[1] * width
    out = bytearray()
    with info.file.open("rb") as f:
        for row in rows:
            f.seek(info.offset + row * stride)
            out += f.read(stride)
    if len(out) != stride * len(rows):
        raise WeightsError(f"{info.file} is truncated.", FIX)
    raw = np.frombuffer(bytes(out), dtype=np.uint16 if width == 2 else np.uint32)
    return mx.array(raw).view(dtype).reshape(len(rows), info.shape[1])
