"""Measuring how fast MLX reads weights from the disk, with a temporary file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx

from mlx_sora.loading.model_folder import weights_root
from mlx_sora.loading.safetensors import load_tensors, read_header
from mlx_sora.utils.files import cache_folder, explain_os_errors
from mlx_sora.utils.leftovers import temporary_folder

#: Largest test file in bytes, and the seconds after which it does not grow any more.
FILE_BYTES, WRITE_SECONDS = 1 << 30, 5.0

#: Bytes of a tensor in the test file: of the size of a layer.
TENSOR_BYTES = 1 << 24

#: Share of the free space that the file takes at most.
_FREE_SHARE = 0.1

#: fcntl's F_NOCACHE of macOS: what goes through this descriptor does not stay in the page cache.
_F_NOCACHE = 48


def disk_speed(clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the bytes per second at which MLX reads a file of the disk with the models.

    clock: returns seconds. The file is made for that, and removed. Raises MlxSoraError if it
    cannot be written.
    """
    with test_file(test_folder()) as path:
        tensors = read_header(path)
        forget_cached(path)
        start = clock()
        arrays = load_tensors(path, tensors)
        for name in tensors:  # one after the other, as blocks come and go
            mx.eval(arrays.pop(name))
        return sum(info.nbytes for info in tensors.values()) / (clock() - start)


def test_folder() -> Path:
    """Return the folder of models if it can be written to, else the cache folder."""
    root = weights_root()
    if root.is_dir() and os.access(root, os.W_OK):
        return root
    folder = cache_folder()
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def test_file(folder: Path) -> Iterator[Path]:
    """Write a temporary safetensors file of random bytes, past the page cache if possible."""
    with (
        explain_os_errors(folder),
        temporary_folder(folder) as own,
    ):
        space = min(FILE_BYTES, shutil.disk_usage(folder).free * _FREE_SHARE)
        path = own / "model.safetensors"
        _write(path, int(space) // TENSOR_BYTES)
        yield path


def _write(path: Path, most: int) -> None:
    """Write up to `most` tensors. The header comes last: its size does not depend on them."""
    if most < 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    data, base = os.urandom(TENSOR_BYTES), 8 + len(_header(0, most))
    start, count = time.perf_counter(), 0
    with path.open("wb") as file:
        if sys.platform == "darwin":
            import fcntl

            with suppress(OSError):  # which some file systems refuse
                fcntl.fcntl(file, _F_NOCACHE, 1)
        file.seek(base)
        while count < most and (count == 0 or time.perf_counter() - start < WRITE_SECONDS):
            file.write(data)
            count += 1
        file.seek(0)
        header = _header(count, most)
        file.write(struct.pack("<Q", len(header)) + header)
        file.flush()
        os.fsync(file.fileno())


def _header(count: int, most: int) -> bytes:
    """Return the header of `count` tensors, padded to the size for `most`."""
    rows = {
        f"{i:06}": {
            "dtype": "U8",
            "shape": [TENSOR_BYTES],
            "data_offsets": [i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES],
        }
        for i in range(count)
    }
    return json.dumps(rows).encode().ljust(150 * most)


def forget_cached(path: Path) -> None:
    """Drop the pages of a file from the page cache, where the system can (Linux)."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
