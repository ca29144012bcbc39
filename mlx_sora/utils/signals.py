"""Signals that end a process: as exceptions while it works, and after what must not be cut."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def signals_as_exceptions(make: Callable[[int], BaseException]) -> Iterator[None]:
    """Raise what `make` returns at SIGTERM and SIGHUP inside the block: partial files are removed.

    A signal that is ignored, as SIGHUP under nohup, or has a handler keeps it.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal may send several
        raise make(number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    if not _is_main_thread():
        numbers = []
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers if _is_main_thread() else ():
            if signal.getsignal(number) in (interrupt, signal.SIG_IGN):
                signal.signal(number, signal.SIG_DFL)


def exit_like(number: int) -> SystemExit:
    """Return the exit of a process that signal `number` ends, with the code that shells show."""
    return SystemExit(128 + number)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP wait until the end of the block. Its work must be short."""
    received: list[int] = []
    if not _is_main_thread():  # in which all signals are handled
        yield
        return
    before: dict[int, Any] = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received[:1]:
            signal.raise_signal(number)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
