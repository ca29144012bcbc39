"""Running a function in another thread than the one in which MLX was used first."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import mlx.core as mx

Result = TypeVar("Result")


def in_thread(function: Callable[[], Result]) -> Result:
    """Return the result of `function`, run in a thread of its own.

    For reads that fail: in the main thread they can leave MLX counting a task that never ends
    (see `mlx_sora.memory.limits.recover_from_failed_read`), which would hang later tests.
    """

    def run() -> Result:
        try:
            return function()
        finally:
            mx.clear_streams()

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(run).result()
