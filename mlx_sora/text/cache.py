"""The text cache: T5's states of earlier prompts, in the cache folder of the user.

A video of a prompt that was encoded before needs no T5, whose weights are the larger part of the
model's bytes. A file holds the states of one prompt, not its text. Nothing here fails a run: what
cannot be read is encoded again, what cannot be written is not stored.
"""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sora.errors import MlxSoraError
from mlx_sora.text.tokenizer import Encoding
from mlx_sora.utils.files import cache_folder, partial_name, remove_partial

#: Folder in the cache folder, and suffix of its files.
FOLDER, SUFFIX = "text", ".states"

#: Most bytes of all files; those used least recently go. A prompt of opensora-1.2 takes up to 5 MB.
MAX_BYTES = 256 << 20

#: Version of the files, part of their names.
FORMAT = 1

#: Bytes of the hash before the safetensors data.
_HASH_SIZE = 16

#: Seconds after a change of a file in which another one may leave its times as they are.
_CLOCK_STEP = 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextCache:
    """States of one text encoder on one device. folder: None if nothing can be stored.

    identity: text that changes with whatever changes the states.
    """

    folder: Path | None
    identity: str

    def __contains__(self, ids: Sequence[int]) -> bool:
        """Return True if the states of these token ids are stored; they may still be damaged."""
        return self.folder is not None and self._file(self.folder, ids).is_file()

    def has_all(self, encodings: Iterable[Encoding]) -> bool:
        """Return True if the states of all these texts are stored."""
        return all(encoding.ids in self for encoding in encodings)

    def get(self, ids: Sequence[int]) -> mx.array | None:
        """Return the states [n, D] of n token ids, evaluated; None if they are not stored."""
        from xxhash import xxh3_128_digest

        if self.folder is None:
            return None
        file = self._file(self.folder, ids)
        try:
            data = file.read_bytes()
        except OSError:
            return None
        if xxh3_128_digest(data[_HASH_SIZE:]) != data[:_HASH_SIZE]:
            logger.debug("%s is damaged", file)
            return None
        with suppress(OSError):
            os.utime(file)  # used now
        arrays: Any = mx.load(io.BytesIO(data[_HASH_SIZE:]), format="safetensors")
        states: mx.array = arrays["states"]
        mx.eval(states)
        return states

    def put(self, ids: Sequence[int], states: mx.array) -> None:
        """Store the states [n, D] of n token ids."""
        from xxhash import xxh3_128_digest

        if self.folder is None:
            return
        buffer = io.BytesIO()
        mx.save_safetensors(buffer, {"states": states})
        data, file = buffer.getvalue(), self._file(self.folder, ids)
        partial = partial_name(file)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(xxh3_128_digest(data) + data)  # no fsync: the hash tells
            partial.replace(file)
        except OSError as error:
            logger.debug("cannot store states: %s", error)
        finally:
            remove_partial(partial)

    def prune(self) -> None:
        """Remove the files that were used least recently, down to `MAX_BYTES`."""
        if self.folder is None:
            return
        with suppress(OSError):
            stats = [(file, file.stat()) for file in self.folder.glob(f"*{SUFFIX}")]
            total = sum(stat.st_size for _, stat in stats)
            for file, stat in sorted(stats, key=lambda each: each[1].st_mtime):
                if total <= MAX_BYTES:
                    return
                file.unlink(missing_ok=True)
                total -= stat.st_size

    def _file(self, folder: Path, ids: Sequence[int]) -> Path:
        from xxhash import xxh3_128_hexdigest

        text = json.dumps([FORMAT, self.identity, list(ids)])
        return folder / (xxh3_128_hexdigest(text.encode()) + SUFFIX)


def open_text_cache(weights: Iterable[Path], facts: Mapping[str, Any]) -> TextCache:
    """Return the cache of a text encoder.

    weights: its files. They count as the same while path, size, times and inode stay, as in
    `loading.fingerprint`; files that changed a moment ago are not trusted yet. facts: JSON values
    of whatever else changes the states.
    """
    found: list[Any] = [facts]
    now = time.time()
    try:
        for file in weights:
            stat = file.stat()
            if stat.st_ctime + _CLOCK_STEP > now:
                return TextCache(None, "")
            found.append(
                [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            )
        return TextCache(cache_folder() / FOLDER, json.dumps(found, sort_keys=True))
    except (OSError, MlxSoraError) as error:
        logger.debug("no text cache: %s", error)
        return TextCache(None, "")
