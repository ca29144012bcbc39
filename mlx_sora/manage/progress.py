"""Progress of downloads, conversions and checks, in bytes of one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class FileProgress:
    """Progress on a file or part.

    action: check, scan, fetch, convert, calibrate or distill. done, total: bytes, prompts of
    calibrate, or prompts and steps of distill.
    """

    action: str
    path: str
    done: int
    total: int


ProgressCallback = Callable[[FileProgress], None]


def byte_counter(
    on_progress: ProgressCallback, action: str, path: str, total: int, offset: int = 0
) -> Callable[[int], None]:
    """Return a function that reports `offset` plus its argument as the bytes done."""
    return lambda done: on_progress(FileProgress(action, path, offset + done, total))


def ignore_progress(progress: FileProgress) -> None:
    """Report nothing."""
