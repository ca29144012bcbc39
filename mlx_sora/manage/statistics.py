"""Statistics of a model's tensors and settings, recorded in a JSON file of its folder.

They recognise weights in any type: scale, kurtosis, constant rows, and sums of the values with
random signs. The difference of such sums estimates the distance of two tensors (Alon, Matias and
Szegedy 1996), so that a moved, swapped or damaged value shows, and rounding does not.

{"format": 1, "written_by": "mlx_sora 0.1.0",
 "settings": {"vae/config.json": "<sha256 of its content>", ...},
 "tensors": {"vae": {"scale": {"dtype": "F32", "shape": [1, 4], "sha256": "...", "rms": 3.1,
                               "kurtosis": 1.1, "constant_rows": 0, "sums": [...]}, ...}, ...}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import hypot, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_sora import __version__
from mlx_sora.errors import WeightsError
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.model_folder import PARTS
from mlx_sora.loading.quantization import CONFIG_KEY, NetworkQuantization, packed_names
from mlx_sora.loading.safetensors import FLOATS, FP8, PACKED, SCALES, TensorInfo
from mlx_sora.manage import provenance
from mlx_sora.manage.progress import ProgressCallback, byte_counter, ignore_progress
from mlx_sora.models.quantized import AFFINE, Quantization
from mlx_sora.request.options import as_text
from mlx_sora.utils.files import atomic_write, sha256
from mlx_sora.utils.json import as_number, read_object

if TYPE_CHECKING:
    import numpy as np

FILE = "statistics.json"
FORMAT = 1

#: Files with records of the other files, which no record lists.
RECORDS = (FILE, provenance.FILE)

#: Values read at a time, and sums per tensor.
_CHUNK, SUMS = 1 << 18, 16

#: Distance that conversions to a type bring, as a share of a tensor's norm, with a margin. All may
#: have gone through bfloat16.
ROUNDING = dict.fromkeys(("F32", "F16", "BF16"), 0.008) | {FP8: 0.1, "8-bit": 0.05, "4-bit": 0.4}
ROUNDING |= {"6-bit": 0.1, "5-bit": 0.2, "3-bit": 0.8, "mxfp8": 0.15, "mxfp4": 0.5, "nvfp4": 0.4}

#: Distance of a tensor from itself: the record has six digits.
SAME = 2e-5

_FIX = "Move the file away, or get the model again."


@dataclass(frozen=True)
class TensorStatistics:
    """Statistics of one tensor; of packed words, those of the dequantized values.

    dtype: code of the file, or such as 4-bit. kurtosis: fourth moment over the square of the
    second, 3 for a normal distribution. constant_rows: rows of equal values. sums: of the values
    with random signs, value i in sum i modulo SUMS. sha256: of the bytes. nan, inf: counts.
    """

    dtype: str
    shape: tuple[int, ...]
    rms: float = 0.0
    kurtosis: float = 0.0
    constant_rows: int = 0
    sums: tuple[float, ...] = (0.0,) * SUMS
    sha256: str = ""
    nan: int = 0
    inf: int = 0

    @property
    def norm(self) -> float:
        """Root of the sum of squares."""
        return self.rms * sqrt(prod(self.shape))

    def to_dict(self) -> dict[str, Any]:
        """Return the recorded fields as JSON values, with six digits."""
        numbers = {name: _rounded(getattr(self, name)) for name in ("rms", "kurtosis")}
        rest = {"constant_rows": self.constant_rows, "sums": [_rounded(x) for x in self.sums]}
        return {"dtype": self.dtype, "shape": self.shape, "sha256": self.sha256} | numbers | rest

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TensorStatistics:
        """Make statistics from `to_dict`'s values. Raises ValueError, TypeError or LookupError."""
        shape, rows = tuple(values["shape"]), values["constant_rows"]
        rms, kurtosis, *sums = map(as_number, (values["rms"], values["kurtosis"], *values["sums"]))
        dtype, digest = (as_text(values[name]) for name in ("dtype", "sha256"))
        if len(sums) != SUMS or not all(type(n) is int and 0 <= n < 2**40 for n in (*shape, rows)):
            raise ValueError("no statistics")
        return cls(dtype, shape, rms, kurtosis, rows, tuple(sums), digest)

    def difference(self, other: TensorStatistics, limit: float = SAME) -> str:
        """Return how the values differ from those of `other`, for a sentence; "" within `limit`.

        limit: distance as a share of the norm.
        """
        if self.shape != other.shape:
            return f"has shape {list(self.shape)}, not {list(other.shape)}"
        distance = hypot(*(a - b for a, b in zip(self.sums, other.sums, strict=True)))
        same_scale = abs(self.norm - other.norm) <= limit * other.norm
        if distance <= limit * other.norm and same_scale:
            return ""
        if self.constant_rows > other.constant_rows:
            return f"has {self.constant_rows} constant rows, not {other.constant_rows}"
        if other.rms == 0 or not 0.9 < self.rms / other.rms < 1.1:
            return f"has a scale of {self.rms:.3g}, not {other.rms:.3g}"
        if not other.kurtosis / 2 < self.kurtosis < 2 * other.kurtosis:
            return f"has a kurtosis of {self.kurtosis:.3g}, not {other.kurtosis:.3g}"
        return f"is about {100 * min(2.0, distance / other.norm):.2g} % away"


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")


@dataclass(frozen=True)
class Statistics:
    """Statistics of a model folder: settings by file, tensors by part and name."""

    settings: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, TensorStatistics]]

    @classmethod
    def measure(cls, folder: Path, on_progress: ProgressCallback = ignore_progress) -> Statistics:
        """Read a whole model, a few megabytes at a time. Raises WeightsError."""
        parts = {part: dict(measure_part(folder, part, on_progress)) for part in PARTS}
        return cls(measure_settings(folder), parts)

    def write(self, folder: Path) -> Path:
        """Write the file into `folder`, atomically, and return its path. Raises WeightsError."""
        content = {
            "format": FORMAT,
            "written_by": f"mlx_sora {__version__}",
            "settings": dict(sorted(self.settings.items())),
            "tensors": {
                part: {name: row.to_dict() for name, row in sorted(rows.items())}
                for part, rows in self.tensors.items()
            },
        }
        # One tensor in a line.
        text = json.dumps(content).replace('}, "', '},\n"').replace(': {"', ':\n{"')
        with atomic_write(folder / FILE, overwrite=True, error=WeightsError) as file:
            file.partial.write_text(text + "\n", encoding="utf-8")
        return folder / FILE

    @classmethod
    def read(cls, folder: Path) -> Statistics | None:
        """Read the file of `folder`, None if it has none. Raises WeightsError if it is damaged."""
        path = folder / FILE
        try:
            content = read_object(path)
            settings = {name: as_text(digest) for name, digest in content["settings"].items()}
            tensors = {
                part: {name: TensorStatistics.from_dict(row) for name, row in rows.items()}
                for part, rows in content["tensors"].items()
            }
            if set(tensors) != set(PARTS):
                raise ValueError("other parts")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise WeightsError(f"Cannot read {path}: {error.strerror}.", "Check rights.") from error
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise WeightsError(f"{path} is damaged.", _FIX) from error
        return cls(settings, tensors)


def measure_settings(folder: Path) -> dict[str, str]:
    """Return a checksum of every file of settings in `folder`, by name.

    Of JSON, the values count, and neither layout nor what `convert` adds. Indexes of weights are
    left out: they are checked against their files. A file that cannot be read has "".
    """
    names = [*folder.glob("*.json"), *folder.glob("*/*.json"), folder / "tokenizer/spiece.model"]
    found = {path.relative_to(folder).as_posix(): path for path in names}
    return {
        name: _digest(path)
        for name, path in sorted(found.items())
        if "/." not in f"/{name}" and ".index" not in name and name not in RECORDS
        if path.is_file()
    }


def _digest(path: Path) -> str:
    try:
        if path.suffix != ".json":
            return sha256(path)
        content = read_object(path)
        content.pop(CONFIG_KEY, None)
        if path.name == "model_index.json":  # what it says beside that makes no video
            content = {name: content.get(name) for name in ("name", "defaults")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except (OSError, ValueError, RecursionError):
        return ""


def measure_part(
    folder: Path,
    part: str,
    on_progress: ProgressCallback = ignore_progress,
    *,
    hashed: Callable[[Path], bool] = lambda _: True,
) -> Iterator[tuple[str, TensorStatistics]]:
    """Yield name and statistics of each tensor of `part`, in the order of the checkpoint.

    hashed: for which files the checksums of tensors are computed, too.
    """
    checkpoint, quantization = Checkpoint.open(folder / part), _read_quantization(folder / part)
    total, done = checkpoint.nbytes, 0
    for name, info in checkpoint.tensors.items():
        counter = byte_counter(on_progress, "scan", part, total, done)
        packing = _packing(checkpoint.tensors, name, quantization)
        row = measure_tensor(info, counter, packing)
        if hashed(info.file):
            row = replace(row, sha256=sha256_of(info))
        done += info.nbytes
        yield name, row


def _read_quantization(folder: Path) -> NetworkQuantization | None:
    """Return the quantization in the config.json of a part, None if it has none that is known."""
    try:
        return NetworkQuantization.from_config(read_object(folder / "config.json"))
    except (OSError, ValueError, RecursionError, WeightsError):  # the doctor reports it
        return None


def _packing(
    tensors: Mapping[str, TensorInfo], name: str, quantization: NetworkQuantization | None
) -> tuple[Quantization, Mapping[str, TensorInfo]] | None:
    """Return form and tensors of the packed weight `name`, None if it is none."""
    form = None if quantization is None else quantization.form(name.removesuffix(".weight"))
    if form is None or tensors[name].dtype != PACKED:
        return None
    names = dict(zip(form.parameters, packed_names(name, form), strict=True))
    found = {parameter: tensors[key] for parameter, key in names.items() if key in tensors}
    rows, groups = found["scales"].shape if "scales" in found else (0, 0)
    shapes = form.packed_shapes((rows, groups * form.group_size))
    if {parameter: info.shape for parameter, info in found.items()} != shapes or not groups:
        return None
    return form, found


def measure_tensor(
    info: TensorInfo,
    on_progress: Callable[[int], None] = lambda _: None,
    packing: tuple[Quantization, Mapping[str, TensorInfo]] | None = None,
) -> TensorStatistics:
    """Return the statistics of a tensor of floats, or of packed words; others have none.

    on_progress: gets the bytes read so far. packing: form and tensors of packed words.
    """
    if packing is not None:
        form, tensors = packing
        shape = (info.shape[0], tensors["scales"].shape[1] * form.group_size)
        totals = _Totals(shape)
        rows = max(1, _CHUNK // shape[1])
        for start in range(0, shape[0], rows):
            totals.add(_dequantize(form, tensors, start, rows).reshape(-1))
            on_progress(min(start + rows, shape[0]) * info.nbytes // shape[0])
        return totals.result(f"{form.bits}-bit" if form.mode == AFFINE else form.mode)
    totals = _Totals(info.shape)
    if info.dtype in FLOATS and info.nbytes:
        rows = max(1, _CHUNK // totals.row)
        count = prod(info.shape) // totals.row
        for start in range(0, count, rows):
            totals.add(_read(info, start, rows, totals.row))
            on_progress(min(start + rows, count) * info.nbytes // count)
    return totals.result(info.dtype)


def _dequantize(
    form: Quantization, tensors: Mapping[str, TensorInfo], start: int, rows: int
) -> np.ndarray:
    """Return `rows` rows of a packed weight from `start` on, float32 [rows, inputs]."""
    import numpy as np

    arrays = {
        name: mx.array(_read(info, start, rows).reshape(-1, info.shape[1]))
        for name, info in tensors.items()
    }
    return np.asarray(form.rotate(form.dequantize(arrays, mx.float32)))


def _read(info: TensorInfo, start: int, rows: int, row: int = 0) -> np.ndarray:
    """Return `rows` rows from `start` on, flat: floats as float32, words as they are.

    row: values per row, of the first axis if 0.
    """
    import numpy as np

    row = row or prod(info.shape[1:])
    width = info.nbytes // max(1, prod(info.shape))
    begin = start * row * width
    with info.file.open("rb") as file:
        file.seek(info.offset + begin)
        raw = file.read(min(rows * row * width, info.nbytes - begin))
    if len(raw) % width or not raw:
        raise WeightsError(f"{info.file} has changed since it was opened.", "Try again.")
    if info.dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    if info.dtype == FP8:
        return np.take(_fp8_values(), np.frombuffer(raw, "u1"))
    kinds = {"F32": "<f4", "F16": "<f2", PACKED: "<u4", SCALES: "u1"}
    array = np.frombuffer(raw, kinds[info.dtype])
    return array.astype("<f4", copy=False) if info.dtype in FLOATS else array


def _fp8_values() -> np.ndarray:
    """Return the value of each code of F8_E4M3, float32 [256]; it has no Inf."""
    import numpy as np

    code = np.arange(128)
    exponent, mantissa = code >> 3, (code & 7) / 8
    values = np.where(exponent, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype("<f4")


class _Totals:
    """Sums over the values of a tensor, which come in chunks of whole rows.

    row: values per row; 1 if there are no rows, or if one would not fit into a chunk.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        import numpy as np

        row = prod(shape[1:]) if len(shape) > 1 else 1
        self.shape, self.row = shape, row if 0 < row <= _CHUNK else 1
        self._count = self._nan = self._inf = self._constant_rows = 0
        self._squares = self._fourths = 0.0
        self._sums = np.zeros(SUMS)
        self._random, self._bits = np.random.PCG64(0), np.zeros(0, np.uint8)

    def add(self, values: np.ndarray) -> None:
        """Add float32 values [count] in the order of the tensor."""
        import numpy as np

        if not np.isfinite(values).all():
            self._nan += int(np.isnan(values).sum())
            self._inf += int(np.isinf(values).sum())
            values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        if self.row > 1:
            rows = values.reshape(-1, self.row)
            rows = rows[rows[:, 0] == rows[:, -1]]
            self._constant_rows += int((rows == rows[:, :1]).all(axis=1).sum())
        start, count = self._count % SUMS, len(values)
        padded = np.zeros(-(-(start + count) // SUMS) * SUMS)
        padded[start : start + count] = (values.view("<u4") ^ self._signs(count)).view("<f4")
        table = padded.reshape(-1, SUMS)
        self._sums += np.ones(len(table)) @ table
        squares = padded * padded
        self._squares += float(squares.sum())
        self._fourths += float(np.dot(squares, squares))
        self._count += count

    def _signs(self, count: int) -> np.ndarray:
        """Return `count` random sign bits of float32. NumPy keeps this generator for ever."""
        import numpy as np

        words = max(0, -(-(count - len(self._bits)) // 64))
        fresh = np.unpackbits(self._random.random_raw(words).astype("<u8").view(np.uint8))
        bits = np.concatenate([self._bits, fresh])
        self._bits = bits[count:]
        return bits[:count].astype("<u4") << 31

    def result(self, kind: str) -> TensorStatistics:
        """Return the statistics of the values so far."""
        count, squares = max(1, self._count), self._squares
        return TensorStatistics(
            kind,
            self.shape,
            sqrt(squares / count),
            count * self._fourths / squares**2 if squares else 0.0,
            self._constant_rows,
            tuple(float(total) for total in self._sums),
            nan=self._nan,
            inf=self._inf,
        )


def sha256_of(info: TensorInfo) -> str:
    """Return the checksum of a tensor's bytes, in hexadecimal."""
    digest, left = hashlib.sha256(), info.nbytes
    with info.file.open("rb") as file:
        file.seek(info.offset)
        while left and (block := file.read(min(left, 16 * _CHUNK))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
