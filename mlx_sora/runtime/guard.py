"""Whether a stage stays within its budget while it runs, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_sora.runtime.profiles import show_bytes
from mlx_sora.runtime.residency import Reading, read_memory


class Guard:
    """Looks at the process between two pieces of work of `stage`. budget: None never minds.

    A run that has outgrown its budget takes less at a time and says so, once; it is not ended,
    since whatever took the memory (the caller's own data, other libraries) may well be gone by
    the time it matters. Where memory is at an end, MLX's own error comes (`device_errors`).
    """

    def __init__(
        self, stage: str, budget: int | None, read: Callable[[], Reading] = read_memory
    ) -> None:
        self._stage, self._budget, self._read = stage, budget, read
        self._told = False

    def look(self, lessen: Callable[[], bool]) -> str | None:
        """Have `lessen` act where the budget is exceeded; the warning, the first time.

        lessen: makes the next piece of work smaller, if it can.
        """
        if self._budget is None:
            return None
        reading = self._read()
        used = reading.outside + max(reading.peak, reading.active + mx.get_cache_memory())
        if used <= self._budget:
            return None
        less = lessen()
        mx.clear_cache()
        if self._told:
            return None
        self._told = True
        follows = "it goes on with less at a time" if less else "nothing is left to save"
        return (
            f"Stage {self._stage} has come to {show_bytes(used)}, over the budget of "
            f"{show_bytes(self._budget)}: {follows}."
        )
