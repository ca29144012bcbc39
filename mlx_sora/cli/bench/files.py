"""Results of a bench on disk: NAME.json and NAME.png in one folder, whole or not there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_sora.errors import MlxSoraError, UsageError

#: Writes a picture as PNG into a file.
Draw = Callable[[Path], None]


@dataclass(frozen=True)
class Files:
    """Where a bench called `name` leaves its results."""

    folder: Path
    name: str
    overwrite: bool

    def check(self) -> None:
        """Raise UsageError unless results can be written; say so when there will be no picture."""
        above = self.folder
        while not above.exists():
            above = above.parent
        if not above.is_dir():
            raise UsageError(f"{above} is no folder.", "Change --output.")
        taken = [path for path in (self._json, self._png) if path.exists()]
        if taken and not self.overwrite:
            raise UsageError(f"{taken[0]} exists already.", "Give --overwrite or another --output.")
        if not _can_draw():
            print(
                f'No {self._png}: matplotlib is missing. Get it: pip install "mlx_sora[bench]"',
                file=sys.stderr,
            )

    def write(self, record: Mapping[str, Any], draw: Draw) -> None:
        """Write both and print their paths; only the JSON where nothing can draw."""
        from mlx_sora.video.publish import published

        text = json.dumps(record, indent=2) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with published(self._json, self.overwrite) as file:
                file.partial.write_text(text, encoding="utf-8")
            print(file.path)
            if _can_draw():
                with published(self._png, self.overwrite) as file:
                    draw(file.partial)
                print(file.path)
        except OSError as error:
            raise MlxSoraError(
                f"Cannot write into {self.folder}: {error.strerror or error}.", "Is the disk full?"
            ) from error

    @property
    def _json(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def _png(self) -> Path:
        return self.folder / f"{self.name}.png"


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None
