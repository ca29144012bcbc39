"""Write a sequence and kill this process at one of the renames at its end.

Arguments: pattern, number of frames, grey of the frames, signal, which rename, before or after it,
and "overwrite" or nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_sora.video.writer import save_frames

PATTERN, FRAMES, GREY, SIGNAL, NUMBER, MOMENT, *OVERWRITE = sys.argv[1:]

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores

calls = iter(range(1000))


def counted(rename: Callable[..., Any]) -> Callable[..., Any]:
    """Return `rename`, which sends the signal in one call."""

    def call(source: Any, target: Any, **options: Any) -> Any:
        hit = next(calls) == int(NUMBER)
        if hit and MOMENT == "before":
            os.kill(os.getpid(), int(SIGNAL))
        result = rename(source, target, **options)
        if hit and MOMENT == "after":
            os.kill(os.getpid(), int(SIGNAL))
        return result

    return call


os.link = counted(os.link)
Path.replace = counted(Path.replace)  # type: ignore[method-assign]
Path.rename = counted(Path.rename)  # type: ignore[method-assign]

frames = np.full((int(FRAMES), 16, 16, 3), int(GREY), np.uint8)
try:
    save_frames(PATTERN, frames, 8, overwrite=bool(OVERWRITE))
except KeyboardInterrupt:
    sys.exit(130)
