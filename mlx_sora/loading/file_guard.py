"""Weights that are read while a run goes on: what becomes of it when files change or disks fail.

MLX reads lazily, by position, from a file that stays open: one that is replaced or removed
meanwhile does no harm, one that is rewritten in place would give weights of two models.
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
from mlx_sora.runtime.device import known_error

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Seconds between the attempts of a read that fails: disks wake up, networks come back.
RETRY_DELAYS = (0.1, 1.0)

#: How the messages of MLX's reader begin (mlx/io/load.h).
_READ_ERROR = "[read]"

#: Bytes of weights that are read at a time.
_EVAL_BYTES = 256 << 20


@dataclass(frozen=True)
class FileStat:
    """What tells one state of a file from another."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def from_path(cls, file: Path) -> FileStat:
        """Of a file as it is now. Raises WeightsError where there is none."""
        try:
            status = file.stat()
        except OSError as error:
            raise WeightsError(f"cannot read {file}: {error.strerror}.", FIX) from error
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class WeightFileGuard:
    """The weight files of `folder`, which are about to be opened and read lazily."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stats = {
            file: FileStat.from_path(file) for file in sorted(folder.glob("*.safetensors"))
        }

    @contextmanager
    def check_reads(self) -> Iterator[None]:
        """They are read inside: WeightsError where one was rewritten, or cannot be read."""
        try:
            yield
        except RuntimeError as error:
            self._refuse_rewritten()
            if not str(error).startswith(_READ_ERROR):
                raise
            message = f"Cannot read the weights in {self._folder}: {error}"
            raise WeightsError(message, FIX) from error
        self._refuse_rewritten()

    def _refuse_rewritten(self) -> None:
        for file, stamp in self._stats.items():
            try:
                now = FileStat.from_path(file)
            except WeightsError:  # removed, while MLX holds it
                continue
            if now != stamp and (now.device, now.inode) == (stamp.device, stamp.inode):
                raise WeightsError(f"{file} was rewritten while it was read.", "Try again.")


def eval_parameters(network: nn.Module) -> None:
    """Read what is lazy in the parameters of `network`, some at a time."""
    waiting: list[mx.array] = []
    parameters: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
    for _, array in parameters:
        waiting.append(array)
        if sum(each.nbytes for each in waiting) >= _EVAL_BYTES:
            mx.eval(waiting)
            waiting.clear()
    mx.eval(waiting)


def retry_read(read: Callable[[], Result], what: str) -> Result:
    """The result of `read`, tried again after a while if the disk fails; then its error."""
    for pause in RETRY_DELAYS:
        try:
            return read()
        except (OSError, RuntimeError) as error:
            if known_error(error, "") is not None:
                raise
            reason = " ".join(str(error).split())[:200]
            logger.warning("reading %s failed (%s), trying again", what, reason)
            time.sleep(pause)
    return read()
