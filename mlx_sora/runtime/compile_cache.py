"""The folder in which MLX's CPU backend keeps the kernels that it compiles.

It is one for all users of a machine: mlx/VERSION/cpu in the folder for temporary files
(mlx/backend/cpu/compiled.cpp). Where MLX cannot use it, the first compiled function fails. MLX
loads every file it finds there: a damaged one ends the process by a signal.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from mlx_sora.errors import MlxSoraError
from mlx_sora.utils.files import atomic_write
from mlx_sora.utils.json import read_object

log = logging.getLogger(__name__)

#: File in the folder with the hashes of the kernels that were whole when they were first seen.
HASHES = "mlx_sora.json"

#: Bytes that must be free there: the compiler's temporary files, a source and its kernel.
SPACE = 4 << 20

#: Seconds for which an unfinished kernel may be one that another process is writing.
_WRITING = 2.0


def ensure_compile_cache() -> None:
    """Turn MLX's compiled functions off if it cannot use their folder; remove damaged kernels.

    Without a folder of the user's, with room, that allows programs, they run operation by
    operation: slower, with results equal to rounding. Logs a warning.
    """
    if sys.platform != "linux" or "MLX_DISABLE_COMPILE" in os.environ:
        return
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # std::filesystem::temp_directory_path
    root = Path(next((os.environ[name] for name in names if os.environ.get(name)), "/tmp"))
    folder = root / "mlx" / version("mlx") / "cpu"
    reason = _fault(root, folder)
    if not reason:
        return
    os.environ["MLX_DISABLE_COMPILE"] = "1"  # for MLX that is not loaded yet, and for children
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].disable_compile()
    log.warning(
        "MLX cannot keep compiled kernels in %s (%s): runs are slower; set TMPDIR to a folder of "
        "yours",
        folder,
        reason,
    )


def _fault(root: Path, folder: Path) -> str:
    """Return why MLX cannot use `folder`; empty if it can."""
    if not root.is_dir():
        return "no such folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            return "it belongs to another user"
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            return "nothing may be executed there"
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, SPACE)
        _remove_damaged(folder)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _remove_damaged(folder: Path) -> None:
    """Remove the kernels that are cut, emptied or changed; MLX compiles them again.

    Raises OSError if one cannot be removed.
    """
    try:
        known = read_object(folder / HASHES)
    except (OSError, ValueError):
        known = {}
    kernels = {file: _hash_if_whole(file, known.get(file.name)) for file in folder.glob("lib*.so")}
    damaged = [file for file, digest in kernels.items() if digest is None]
    for file in damaged:
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
    if damaged:
        log.warning("damaged kernels of MLX in %s: removed %d of them", folder, len(damaged))
    whole = {file.name: digest for file, digest in kernels.items() if digest is not None}
    if whole != known:
        with suppress(MlxSoraError), atomic_write(folder / HASHES, overwrite=True) as record:
            record.partial.write_text(json.dumps(whole), encoding="utf-8")


def _hash_if_whole(file: Path, known: object) -> str | None:
    """Return the hash of a kernel; None if it is damaged. known: its earlier hash, if any."""
    from xxhash import xxh3_64_hexdigest

    while True:
        try:
            data, changed = file.read_bytes() if file.is_file() else b"", file.stat().st_mtime
        except OSError:
            return None
        digest = xxh3_64_hexdigest(data)
        if digest == known or (known is None and _is_whole(data)):
            return digest
        if not 0 <= time.time() - changed < _WRITING:
            return None
        time.sleep(0.1)  # the linker of another process may be at work


def _is_whole(data: bytes) -> bool:
    """Return True if an ELF file of 64 bits ends where it should and no page of it is all zeros."""
    try:
        segments, sections = struct.unpack_from("<QQ", data, 32)
        segment_size, segment_count, section_size, section_count = struct.unpack_from(
            "<4H", data, 54
        )
        end = sections + section_size * section_count
        if data[:5] != b"\x7fELF\x02" or not section_count or end > len(data):
            return False
        for index in range(segment_count):
            kind, _, first, _, _, size = struct.unpack_from(
                "<IIQQQQ", data, segments + index * segment_size
            )
            pages = range(first, first + size, 4096) if kind == 1 else ()  # 1: to be loaded
            if any(not any(data[page : min(page + 4096, first + size)]) for page in pages):
                return False
    except struct.error:
        return False
    return True
