"""A bar of progress for runs that Python starts."""

from __future__ import annotations

from mlx_sora.runtime.events import Event, Finished
from mlx_sora.runtime.progress import RunProgress, progress_speed, progress_title


class ProgressBar:
    """Bar of tqdm on stderr over a whole run: share of the work, stage, rate and time left."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._progress = RunProgress()
        self._bar = tqdm(total=1.0, bar_format="{desc}|{bar}|{percentage:3.0f}%{postfix}")

    def handle(self, event: Event) -> None:
        """Take an event into account."""
        self._progress.handle(event)
        self._bar.set_description_str(progress_title(self._progress), refresh=False)
        self._bar.set_postfix_str(progress_speed(self._progress), refresh=False)
        share = 1.0 if isinstance(event, Finished) else self._progress.fraction
        self._bar.update(share - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is; further output begins on a new line."""
        self._bar.close()
