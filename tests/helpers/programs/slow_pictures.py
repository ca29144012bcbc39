"""The command line on a slow disk: each picture and each rename of a sequence takes a while.

Prints an event at the beginning and end of both, with the time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_sora.cli.main import main
from mlx_sora.utils import files
from mlx_sora.video import writer

#: Seconds.
DELAY = 0.02

seen: set[str] = set()


def mark(name: str) -> None:
    """Print a moment once."""
    if name not in seen:
        seen.add(name)
        sys.stdout.write(json.dumps({"event": "moment", "name": name, "time": time.time()}) + "\n")
        sys.stdout.flush()


def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a delay before and after it."""

    def call(*arguments: Any) -> Any:
        time.sleep(DELAY / 2)
        result = function(*arguments)
        time.sleep(DELAY / 2)
        return result

    return call


def between(begin: str, end: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with marks around it."""

    def call(*arguments: Any) -> Any:
        mark(begin)
        result = function(*arguments)
        mark(end)
        return result

    return call


writer.save_png = between("writing", "first picture", slowly(writer.save_png))
writer.rename_all = between("renaming", "renamed", writer.rename_all)
files._rename_if_free = slowly(files._rename_if_free)
Path.rename = slowly(Path.rename)  # type: ignore[method-assign]

sys.exit(main())
