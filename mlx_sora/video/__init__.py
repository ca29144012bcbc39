"""The result of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import UsageError
from mlx_sora.request.generation import keyword_errors

if TYPE_CHECKING:
    import numpy as np

    from mlx_sora.request.generation import GenerationRequest

__all__ = ["Video"]


@dataclass(frozen=True, repr=False)
class Video:
    """A finished video or image, which a notebook plays.

    path: the file; None if there is no output file, or on a rank other than 0. frames: its pixels.
    width, height: pixels of the frames. timings: seconds per stage. memory: peak bytes per stage.
    metadata: the record that is also in the file. decoded: the frames, if there is no output file;
    rank 0 only.
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
    decoded: np.ndarray | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        """Return one line: file, size, length, seed and the start of the prompt."""
        name = "in memory" if self.path is None else repr(str(self.path))
        length = f"{self.num_frames} frames, {self.fps:g} fps" if self.num_frames > 1 else "image"
        prompt = shorten(self.request.prompt, 60, placeholder="…")
        size = f"{self.width}x{self.height}"
        return f"Video({name}, {size}, {length}, seed={self.seed}, prompt={prompt!r})"

    def _repr_html_(self) -> str:
        """Return a player for notebooks."""
        from mlx_sora.video.notebook import to_html

        return to_html(self)

    @cached_property
    def frames(self) -> np.ndarray:
        """Frames uint8 [F, H, W, 3], read back once if they are in a file.

        Exact without an output file and from png; mp4, mov, webm, gif and webp lose a little.
        Raises UsageError if the file is gone, and on a rank other than 0, which has none.
        """
        if self.decoded is not None:
            return self.decoded
        if self.path is None:
            raise UsageError("This rank has no frames of the video.", "Use those of rank 0.")
        from mlx_sora.video.reader import read_frames

        return read_frames(self.path, self.num_frames)

    @keyword_errors()
    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the video to `path`, in the format of its suffix, and return the path.

        Takes the names that `output` takes. A file of the same format is copied; another one is
        written from `frames`, and loses what their file has lost. Raises UsageError.
        """
        from mlx_sora.utils.files import atomic_write, explain_os_errors, new_folders
        from mlx_sora.video.output_path import (
            check_output,
            complete_path,
            frame_path,
            is_sequence,
        )
        from mlx_sora.video.writer import save_frames, write_encoded_frames

        path = complete_path(os.fspath(path), self.num_frames)
        source = self.path
        kinds = [(is_sequence(p), p.suffix.lower()) for p in (source, path) if p is not None]
        if source is None or self.decoded is not None or kinds[0] != kinds[1]:
            record = self.metadata if self.request.embed_metadata else None
            return save_frames(path, self.frames, self.fps, record, overwrite)
        check_output(path, overwrite, num_frames=self.num_frames)
        if is_sequence(path):
            files = [frame_path(source, i) for i in range(self.num_frames)]
            with explain_os_errors(path):
                return write_encoded_frames(path, (f.read_bytes() for f in files), overwrite)
        with (
            explain_os_errors(path),
            new_folders(path.parent),
            atomic_write(path, overwrite) as file,
        ):
            shutil.copyfile(source, file.partial)
        return file.path
