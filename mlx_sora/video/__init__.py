"""What a run gives back."""

from __future__ import annotations

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

    path: file it was written to, None when no output was asked for; then `frames` holds the video,
    uint8 [F, H, W, 3]. Of several ranks the first has them, the others neither. width, height:
    pixels of the frames. timings: seconds per stage. memory: peak bytes per stage. metadata: the
    record that is also inside the file.
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
        """Write the video to `path` (mp4, gif, webp, png, name_%04d.png); the path written.

        A video that is in a file already can only be copied, to the same kind of file.
        """
        from mlx_sora.utils.files import atomic_write
        from mlx_sora.video.output_path import check_output
        from mlx_sora.video.writer import save_frames

        path = Path(path)
        if self.frames is not None:
            record = self.metadata if self.request.embed_metadata else None
            return save_frames(path, self.frames, self.fps, record, overwrite)
        if self.path is None or self.path.suffix.lower() != path.suffix.lower():
            raise UsageError(
                f"The frames were not kept, so {path.name} cannot be made.",
                "Give output=... that way, or none to keep the frames.",
            )
        check_output(path, overwrite, num_frames=self.num_frames)
        with atomic_write(path, overwrite) as file:
            shutil.copyfile(self.path, file.partial)
        return file.path
