"""Conversion of frames to bytes, and frame writers for runs that write no file."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_sora.runtime.device import to_numpy
from mlx_sora.video.writer import VideoWriter, enlarge

if TYPE_CHECKING:
    import numpy as np


def to_uint8(frames: mx.array) -> np.ndarray:
    """Convert float frames in [-1, 1] to uint8, rounded to nearest as Open-Sora does."""
    return to_numpy(mx.floor(mx.clip(frames, -1, 1) * 127.5 + 128).astype(mx.uint8))


class _NoOutput(AbstractContextManager["_NoOutput"]):
    """Replacement of a `VideoWriter` that writes no file."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] | None = None
        self.path = None

    def finish(self) -> None:
        """Do nothing."""

    def __exit__(self, *error: object) -> None:
        """Do nothing."""


class FrameCounter(_NoOutput):
    """Counts frames, for ranks that write nothing."""

    num_frames = 0

    def write(self, frames: np.ndarray) -> None:
        """Count uint8 frames [n, H, W, 3]."""
        self.num_frames += len(frames)


class FramesInMemory(_NoOutput):
    """Keeps the frames of a run without an output file, enlarged `scale` times."""

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        self._scale = scale
        self._parts: list[np.ndarray] = []

    @property
    def num_frames(self) -> int:
        return sum(len(part) for part in self._parts)

    @property
    def frames(self) -> np.ndarray:
        """All frames, uint8 [F, H, W, 3]."""
        import numpy as np

        return np.concatenate(self._parts)

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 frames [n, H, W, 3]."""
        self._parts.append(enlarge(frames, self._scale))


#: Any receiver of the frames of a run.
FrameWriter = VideoWriter | FramesInMemory | FrameCounter
