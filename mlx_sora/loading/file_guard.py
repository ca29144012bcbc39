"""Protection of a run against weight files that change and disks that fail.

MLX reads lazily from open files. A file that is replaced or removed meanwhile does no harm. A file
that is rewritten in place would mix the weights of two models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_sora.errors import WeightsError
from mlx_sora.loading.safetensors import FIX
from mlx_sora.memory.limits import recover_from_failed_read
from mlx_sora.runtime.device import explain_device_error
from mlx_sora.utils.files import visible_files

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Seconds between the attempts of a failing read: disks wake up, networks come back.
RETRY_DELAYS = (0.1, 1.0)

#: Prefix of the messages of MLX's reader (mlx/io/load.h).
_READ_ERROR = "[read]"

#: Bytes of weights that are evaluated at a time.
_EVAL_BYTES = 256 << 20


@dataclass(frozen=True)
class FileStat:
    """Identity, size and modification time of a file."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def from_path(cls, file: Path) -> FileStat:
        """Return the current state of `file`. Raises WeightsError if there is none."""
        try:
            stat = file.stat()
        except OSError as error:
            raise WeightsError(f"cannot read {file}: {error.strerror}.", FIX) from error
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


class WeightFileGuard:
    """The weight files of `folder`, recorded before they are opened and read lazily."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stats = {
            file: FileStat.from_path(file) for file in visible_files(folder, "*.safetensors")
        }

    @contextmanager
    def check_reads(self) -> Iterator[None]:
        """Raise WeightsError if a file was rewritten or cannot be read inside the block."""
        try:
            yield
        except RuntimeError as error:
            if not _is_read_error(error):
                self._refuse_rewritten()
                raise
            recover_from_failed_read()
            self._refuse_rewritten()
            message = f"Cannot read the weights in {self._folder}: {error}"
            raise WeightsError(message, FIX) from error
        self._refuse_rewritten()

    def _refuse_rewritten(self) -> None:
        for file, before in self._stats.items():
            try:
                now = FileStat.from_path(file)
            except WeightsError:  # removed, but MLX holds it open
                continue
            if now != before and (now.device, now.inode) == (before.device, before.inode):
                raise WeightsError(f"{file} was rewritten while it was read.", "Try again.")


def _is_read_error(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith(_READ_ERROR)


def eval_parameters(network: nn.Module) -> None:
    """Evaluate the lazy parameters of `network`, a few at a time."""
    pending: list[mx.array] = []
    parameters: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
    for _, array in parameters:
        pending.append(array)
        if sum(each.nbytes for each in pending) >= _EVAL_BYTES:
            mx.eval(pending)
            pending.clear()
    mx.eval(pending)


def retry_read(read: Callable[[], Result], name: str) -> Result:
    """Return the result of `read`; after a failure of the disk, wait and try again.

    name: of what is read, for the log. Raises what the last attempt raises.
    """
    for pause in RETRY_DELAYS:
        try:
            return read()
        except (OSError, RuntimeError) as error:
            if explain_device_error(error, "") is not None:
                raise
            if _is_read_error(error):
                recover_from_failed_read()
            reason = " ".join(str(error).split())[:200]
            logger.warning("reading %s failed (%s), trying again", name, reason)
            time.sleep(pause)
    return read()
