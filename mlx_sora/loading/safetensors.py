"""Validated safetensors headers, lazy tensors, and single rows of a table.

`mx.load` is lazy but does not validate: a truncated file fails only when a tensor is used, and an
embedding table is always read in full. Here the header is checked against the file first.
Format: 8 bytes little-endian header size, JSON header, data. Source: the safetensors specification.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_sora.errors import WeightsError
from mlx_sora.utils.json import LFS_POINTER, lfs_command, parse_object

#: Type code of 8-bit floats, which are read as bfloat16. It holds each of them exactly.
FP8 = "F8_E4M3"

#: Floating types of weights. BF16 comes last: of the two it is the one to write.
FLOATS: dict[str, mx.Dtype] = {
    "F32": mx.float32,
    "F16": mx.float16,
    FP8: mx.bfloat16,
    "BF16": mx.bfloat16,
}

#: Type code of the words that hold quantized weights.
PACKED = "U32"

#: Type code of the scales of small floats; each byte is a float by itself.
SCALES = "U8"

#: Types of the tensors of quantized weights that no run casts.
CODES: dict[str, mx.Dtype] = {PACKED: mx.uint32, SCALES: mx.uint8}

_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4} | dict.fromkeys(
    ("F16", "BF16", "I16", "U16"), 2
)
_SIZES |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1)

#: Largest header in bytes. The specification allows 100 MB, which would take gigabytes to parse;
#: the largest model here has 0.1 MB.
MAX_HEADER = 8_000_000

#: Most dimensions of a tensor; no network has as many.
MAX_DIMENSIONS = 8

FIX = "Download or copy the file again."


@dataclass(frozen=True)
class TensorInfo:
    """Position of a tensor: file, dtype code, shape, offset in the file and size in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the tensor table of a safetensors file and check it against the file's size.

    As the specification requires, the tensors fill the file without overlap or gap.
    Raises WeightsError that names the file and, where possible, the tensor.
    """
    try:
        if not path.is_file():
            raise WeightsError(f"{path} is not a file.", "Check path and rights.")
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            if LFS_POINTER.startswith(start) and start:
                raise WeightsError(
                    f"{path} is a Git LFS pointer, not the file itself.",
                    f"Fetch it: {lfs_command(path)}",
                )
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
            if length > min(MAX_HEADER, size - 8):
                raise WeightsError(
                    f"{path} is not a complete safetensors file ({size} bytes).", FIX
                )
            header = parse_object(f.read(length))
    except OSError as error:
        raise WeightsError(
            f"Cannot read {path}: {error.strerror}.", "Check path and rights."
        ) from error
    except ValueError as error:
        raise WeightsError(f"{path} has a damaged safetensors header: {error}.", FIX) from error
    notes = header.pop("__metadata__", None)
    _check_texts(path, {} if notes is None else notes, header)  # MLX writes null
    base = 8 + length
    tensors = {key: _tensor_info(path, base, key, row) for key, row in header.items()}
    _check_layout(path, tensors, base, size)
    return tensors


def _check_texts(path: Path, notes: Any, names: Iterable[str]) -> None:
    """Raise WeightsError unless the metadata are texts and all texts are Unicode.

    JSON can hold half of a surrogate pair, which no other reader of the format takes.
    """
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise WeightsError(f"{path} has a damaged safetensors header: __metadata__.", FIX)
    try:
        "".join((*notes, *notes.values(), *names)).encode()
    except UnicodeEncodeError:
        raise WeightsError(f"{path} has a damaged safetensors header: a text.", FIX) from None


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], base: int, size: int) -> None:
    """Raise WeightsError unless the tensors fill the file from byte `base` without overlap."""
    end = base
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            fault = "overlaps" if info.offset < end else "leaves a gap after"
            raise WeightsError(f"{path}: {key} {fault} the tensor before it.", FIX)
        end += info.nbytes
    if end > size:
        raise WeightsError(f"{path} is truncated: it needs {end} bytes and has {size}.", FIX)
    if end < size:
        raise WeightsError(f"{path} has {size - end} extra bytes after its last tensor.", FIX)


def _tensor_info(path: Path, base: int, key: str, row: Any) -> TensorInfo:
    try:
        dtype, shape = row["dtype"], _parse_counts(row["shape"])
        begin, end = _parse_counts(row["data_offsets"])
        width = _SIZES[dtype]
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(f"{path}: the header entry of {key} is damaged.", FIX) from error
    expected = prod(shape) * width
    if end - begin != expected:
        raise WeightsError(
            f"{path}: {key} is {dtype} {list(shape)}, which needs {expected} bytes, "
            f"but its entry spans {end - begin}.",
            FIX,
        )
    return TensorInfo(path, dtype, shape, base + begin, expected)


def _parse_counts(values: Any) -> tuple[int, ...]:
    if type(values) is not list or not all(type(n) is int and 0 <= n < 1 << 63 for n in values):
        raise ValueError("not a list of counts")
    return tuple(values)


def load_tensors(
    file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None = None
) -> dict[str, mx.array]:
    """Return the named tensors of one file as lazy arrays, read at their first evaluation.

    stream: runs the read; None means the default of the calling thread. Raises WeightsError if the
    file is gone or no longer matches its header.
    """
    try:
        arrays = mx.load(str(file), format="safetensors", stream=stream)
    except (RuntimeError, ValueError) as error:  # ValueError: a name that is not UTF-8
        raise WeightsError(f"MLX cannot load {file}: {error}", FIX) from error
    assert isinstance(arrays, dict)
    types = FLOATS | CODES | {FP8: mx.uint8}
    for key, info in tensors.items():
        array = arrays.get(key)
        if (
            array is None
            or array.shape != info.shape
            or array.dtype != types.get(info.dtype, array.dtype)
        ):
            raise WeightsError(f"{file} has changed since it was opened (see {key}).", "Try again.")
    return {
        key: mx.from_fp8(arrays[key], mx.bfloat16, stream=stream)
        if info.dtype == FP8
        else arrays[key]
        for key, info in tensors.items()
    }


class Reader(Protocol):
    """Reads tensors from a file; `load_tensors` is the plain one."""

    def __call__(
        self, file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None = None
    ) -> dict[str, mx.array]:
        """Return a new dict of the named tensors, lazy on `stream` or evaluated.

        Raises WeightsError, OSError or RuntimeError.
        """


def memory_dtype(stored: str, dtype: mx.Dtype) -> mx.Dtype:
    """Return the type in memory of a `stored` type: codes stay, floats become `dtype`."""
    return CODES.get(stored, dtype)


def read_rows(info: TensorInfo, rows: Sequence[int]) -> mx.array:
    """Return `rows` of a 2-D tensor, [len(rows), columns]. Reads nothing else."""
    import numpy as np

    dtype = mx.uint8 if info.dtype == FP8 else (FLOATS | CODES)[info.dtype]
    stride = info.shape[1] * dtype.size
    out = bytearray()
    try:
        with info.file.open("rb") as f:
            for row in rows:
                f.seek(info.offset + row * stride)
                out += f.read(stride)
    except OSError as error:
        raise WeightsError(f"Cannot read {info.file}: {error.strerror}.", FIX) from error
    if len(out) != stride * len(rows):
        raise WeightsError(f"{info.file} is truncated.", FIX)
    raw = np.frombuffer(bytes(out), dtype=f"<u{dtype.size}")
    found = mx.array(raw).view(dtype).reshape(len(rows), info.shape[1])
    return mx.from_fp8(found, mx.bfloat16) if info.dtype == FP8 else found
