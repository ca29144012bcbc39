"""How far files are: one bar each on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_sora.loading.download import Progress


class Bars:
    """One bar per file on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._shown: tuple[str, str] | None = None

    def note(self, text: str) -> None:
        """A line beside the bars."""
        if not self._quiet:
            print(text, file=sys.stderr)

    def show(self, progress: Progress) -> None:
        """Draw what a command reports."""
        if self._quiet:
            return
        if self._shown != (progress.action, progress.path):
            self.close()
            self._shown = (progress.action, progress.path)
            self._bar = self._open(progress)
        self._bar.update(progress.done - self._bar.n)

    def close(self) -> None:
        """End the bar on the screen."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._shown = None

    def _open(self, progress: Progress) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=progress.total,
            # What was there before counts as done, not as speed.
            initial=progress.done if progress.action == "fetch" else 0,
            desc=f"{progress.action} {progress.path}",
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )
