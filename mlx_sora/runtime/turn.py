"""One run at a time in a process.

MLX's limits of memory and cache, and the peaks that budgets are decided by, belong to the process;
and compiled functions that several threads call have been seen to abort it at exit (MLX 0.32). So
the second of two runs is refused by name, which a caller can wait upon, rather than made on luck.
A thread besides the main one that has made videos should end with `mx.clear_streams()`: without it
MLX 0.32 aborts the process at exit, when all is done. It cannot be done here, as a thread that has
cleared its streams has none to work on any more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_sora.errors import UsageError

_turn = threading.Lock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the process's turn. Raises UsageError where another run, of any thread, has it."""
    if not _turn.acquire(blocking=False):
        raise UsageError(
            "Another run of this process is under way.",
            "Wait for its end, close its generator, or start a process for this one.",
        )
    try:
        yield
    finally:
        _turn.release()
