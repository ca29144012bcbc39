"""The fingerprint of a model: a short text for all bytes of its weights and configurations.

Checkpoints and ranks compare it. It needs all weights once: the hash of a large file is stored in
the cache folder of the user, and holds while size, times and inode of the file stay.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlx_sora.errors import MlxSoraError, WeightsError
from mlx_sora.loading.model_folder import PARTS, ModelFolder
from mlx_sora.loading.safetensors import FIX
from mlx_sora.utils.files import atomic_write, cache_folder
from mlx_sora.utils.json import read_object

FILE_NAME = "hashes.json"

#: Version of the file's format.
FORMAT = 1

#: Start of each fingerprint. Those of earlier versions had none and covered a sample of the bytes.
PREFIX = "xxh3:"

#: Bytes from which on a hash is stored. Smaller files are always read.
LARGE = 32 << 20

#: Most files in the cache; the oldest go.
MAX_FILES = 1000

#: Nanoseconds after a change in which another one may leave the time as it is (2 s on FAT).
_CLOCK_STEP = 2_000_000_000

#: Bytes hashed at a time, which stay in the cache of the processor.
_READ_SIZE = 1 << 20

logger = logging.getLogger(__name__)

#: State of a file (see `_state`) and hash of its content.
_Entry = tuple[tuple[int, ...], str]


class FileHashes:
    """Hashes of files by path, in memory and in the cache folder."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] | None = None

    def unread(self, files: Sequence[Path]) -> list[Path]:
        """Return the files that have to be read, since they are small, new or changed."""
        if self._entries is None:
            self._entries = _read_cache()
        return [file for file in files if not self._is_known(file)]

    def _is_known(self, file: Path) -> bool:
        assert self._entries is not None
        state, _ = self._entries.get(_key(file), ((0,), ""))
        return state[0] >= LARGE and state == _state(file)

    def hash(self, file: Path, on_read: Callable[[], None] | None = None) -> str:
        """Return the hash of a file. on_read: called from time to time while it is read."""
        for _ in self.read(file) if self.unread([file]) else ():
            if on_read is not None:
                on_read()
        assert self._entries is not None
        return self._entries[_key(file)][1]

    def read(self, file: Path) -> Iterator[int]:
        """Hash a file; yield the bytes of each part. Nothing is stored unless all are read.

        Raises WeightsError if the file cannot be read, or changes meanwhile.
        """
        from xxhash import xxh3_128

        started, state, digest = time.time_ns(), _state(file), xxh3_128()
        buffer = memoryview(bytearray(_READ_SIZE))
        try:
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    digest.update(buffer[:count])
                    yield count
        except OSError as error:
            raise WeightsError(f"Cannot read {file}: {error.strerror}.", FIX) from error
        if _state(file) != state:
            raise WeightsError(f"{file} was rewritten while it was read.", "Try again.")
        entry = (state, digest.hexdigest())
        self._entries = {**(self._entries or {}), _key(file): entry}
        # The change time, which no program can set.
        if state[0] >= LARGE and state[2] + _CLOCK_STEP < started:
            _store(_key(file), entry)


def weight_files(model: ModelFolder) -> dict[str, list[Path]]:
    """Return the files of each part that hold its tensors. Raises WeightsError."""
    return {
        part: sorted({info.file for info in model.checkpoint(part).tensors.values()})
        for part in PARTS
    }


def fingerprint(
    model: ModelFolder,
    hashes: FileHashes | None = None,
    on_read: Callable[[], None] | None = None,
) -> str:
    """Return the text that identifies a model: it changes with any byte of weights and tokenizer.

    It also covers the values of the configurations. on_read: called while weights are read.
    Raises WeightsError for files that cannot be read.
    """
    from xxhash import xxh3_128

    hashes = hashes or FileHashes()
    found: list[object] = [hashes.hash(model.tokenizer)]
    for part, files in weight_files(model).items():
        found += [part, model.config(part), sorted(hashes.hash(file, on_read) for file in files)]
    return PREFIX + str(xxh3_128(json.dumps(found, sort_keys=True).encode()).hexdigest())


def _key(file: Path) -> str:
    # Files of the hub's cache are links to their content.
    return str(file.resolve())


def _state(file: Path) -> tuple[int, ...]:
    """Return size, time of the last write, time of the last change, and inode."""
    try:
        stat = file.stat()
    except OSError as error:
        raise WeightsError(f"Cannot read {file}: {error.strerror}.", FIX) from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _read_cache() -> dict[str, _Entry]:
    """Return the stored hashes; none if the file is missing, damaged or of another version."""
    try:
        content = read_object(cache_folder() / FILE_NAME)
        if content["format"] != FORMAT:
            return {}
        entries = {
            str(file): (tuple(map(int, state)), str(digest))
            for file, (state, digest) in content["files"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, MlxSoraError) as error:
        logger.debug("no stored hashes: %s", error)
        return {}
    return {file: entry for file, entry in entries.items() if len(entry[0]) == 4}


def _store(file: str, entry: _Entry) -> None:
    """Add a hash to the cache. Of two processes that store at once, one may have to read again."""
    entries = _read_cache()
    entries.pop(file, None)
    newest = [*entries.items(), (file, entry)][-MAX_FILES:]
    try:
        path = cache_folder() / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, overwrite=True) as partial:
            text = json.dumps({"format": FORMAT, "files": dict(newest)})
            partial.partial.write_text(text, encoding="utf-8")
    except (OSError, MlxSoraError) as error:
        logger.debug("cannot store a hash: %s", error)
