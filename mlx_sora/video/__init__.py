"""The result of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from mlx_sora.request.generation import GenerationRequest

__all__ = ["Video"]


@dataclass(frozen=True)
class Video:
    """A finished video or image.

    path: the file; None if there is no output file, or on a rank other than 0. frames: uint8 [F, H,
    W, 3] if there is no output file; rank 0 only. width, height: pixels of the frames. timings:
    seconds per stage. memory: peak bytes per stage. metadata: the record that is also in the file.
    """

    path: Path | None
    request: GenerationRequest
    width: int
    height: int
    num_frames: int
    fps: float
    seed: int
    warnings: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    frames: np.ndarray | None = field(default=None, repr=False, compare=False)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the video to `path` (mp4, gif, webp, png, name_%04d.png) and return the path.

        A video that is in a file already can only be copied, to a file of the same format.
        """
        from mlx_sora.utils.files import atomic_write, explain_os_errors
        from mlx_sora.video.output_path import check_output, frame_path, is_sequence
        from mlx_sora.video.writer import save_frames, write_encoded_frames

        path = Path(os.path.expanduser(path))
        if self.frames is not None:
            record = self.metadata if self.request.embed_metadata else None
            return save_frames(path, self.frames, self.fps, record, overwrite)
        kinds = [(is_sequence(p), p.suffix.lower()) for p in (self.path, path) if p is not None]
        if kinds[0] != kinds[-1] or self.path is None:
            raise UsageError(
                f"The frames are no longer in memory, so {path.name} cannot be written.",
                "Give output=... with that suffix, or none to keep the frames in memory.",
            )
        check_output(path, overwrite, num_frames=self.num_frames)
        if is_sequence(path):
            files = [frame_path(self.path, i) for i in range(self.num_frames)]
            with explain_os_errors(path):
                return write_encoded_frames(path, (f.read_bytes() for f in files), overwrite)
        with atomic_write(path, overwrite) as file:
            shutil.copyfile(self.path, file.partial)
        return file.path
