"""Frames between the VAE and a file: their bytes, and keeping them when no file was asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_sora.video.writer import VideoWriter

if TYPE_CHECKING:
    import numpy as np


def to_uint8(frames: mx.array) -> np.ndarray:
    """Float frames in [-1, 1] to uint8, rounded to nearest as Open-Sora saves them."""
    import numpy as np

    return np.array(mx.floor(mx.clip(frames, -1, 1) * 127.5 + 128).astype(mx.uint8))


class _NoOutput(AbstractContextManager["_NoOutput"]):
    """Stands in for a `VideoWriter` where there is no file to put in place."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] | None = None
        self.path = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to put in place."""


class FrameCounter(_NoOutput):
    """For ranks that write nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_frames = 0

    def write(self, frames: np.ndarray) -> None:
        """Count uint8 frames [n, H, W, 3]."""
        self.num_frames += len(frames)


class FramesInMemory(_NoOutput):
    """For runs without an output: the frames stay in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[np.ndarray] = []

    @property
    def num_frames(self) -> int:
        return sum(len(part) for part in self._parts)

    @property
    def frames(self) -> np.ndarray:
        """uint8 [F, H, W, 3]."""
        import numpy as np

        return np.concatenate(self._parts)

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 frames [n, H, W, 3]."""
        self._parts.append(frames)


#: Whatever takes the frames of a run.
FrameWriter = VideoWriter | FramesInMemory | FrameCounter
