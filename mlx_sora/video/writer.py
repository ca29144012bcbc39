"""Video writers: frames are written as they are decoded; the finished file appears at the end."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import MlxSoraError
from mlx_sora.utils.files import (
    atomic_write,
    explain_os_errors,
    free_names,
    fsync,
    partial_name,
    remove_partial,
    remove_stale_partials,
    rename_into_place,
)
from mlx_sora.video.encoders import AnimationEncoder, FrameEncoder, Mp4Encoder, PngEncoder, save_png
from mlx_sora.video.output_path import (
    check_format,
    check_output,
    existing_files,
    frame_path,
    is_sequence,
    sidecar_path,
)

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


def open_writer(
    path: str | Path,
    width: int,
    height: int,
    fps: float,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    *,
    check: bool = True,
) -> VideoWriter:
    """Open a writer for the kind of file that `path` names. Use it in a `with` block.

    check: call `check_output` first, which raises UsageError. Without it, a file that has appeared
    since an earlier check is not an error. Raises MlxSoraError if the file system refuses.
    """
    path = Path(path)
    if check:
        check_output(path, overwrite, size=(width, height), fps=fps)
    with explain_os_errors(path):
        kind = SequenceWriter if is_sequence(path) else FileWriter
        return kind(path, (width, height), fps, metadata, overwrite)


class VideoWriter(ABC):
    """Takes frames; leaves a finished file at `path` if its block ends without an error.

    metadata: recorded in the file; may be replaced until the block ends. None records nothing.
    path: of the file; a free name nearby if another file has appeared at the given one.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        fps: float,
        metadata: Mapping[str, Any] | None,
        overwrite: bool,
    ) -> None:
        self.path, self.size, self.fps = path, size, fps
        self.metadata = metadata
        self.overwrite = overwrite
        self.num_frames = 0
        remove_stale_partials(path)
        self._open()

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 frames [n, H, W, 3]."""
        width, height = self.size
        if frames.shape[1:] != (height, width, 3) or frames.dtype.name != "uint8":
            raise ValueError(
                f"expected uint8 [n, {height}, {width}, 3], "
                f"found {frames.dtype.name} {list(frames.shape)}"
            )
        with explain_os_errors(self.path):
            for frame in frames:
                self._write_frame(frame)
                self.num_frames += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                if not self.num_frames:
                    raise MlxSoraError("No frame was decoded, so nothing was written.")
                with explain_os_errors(self.path):
                    self._commit()
        finally:
            self._clean_up()

    def _record(self) -> dict[str, Any] | None:
        return None if self.metadata is None else dict(self.metadata)

    @abstractmethod
    def _open(self) -> None:
        """Prepare for the first frame."""

    @abstractmethod
    def _write_frame(self, frame: np.ndarray) -> None:
        """Write frame number `num_frames`, uint8 [H, W, 3]."""

    @abstractmethod
    def _commit(self) -> None:
        """Rename the finished file into place."""

    @abstractmethod
    def _clean_up(self) -> None:
        """Free everything and remove partial files; also called after `_commit`."""


class FileWriter(VideoWriter):
    """One file: mp4, gif, webp, or png of a single frame."""

    def _open(self) -> None:
        self._partial = partial_name(self.path)
        self._encoder: FrameEncoder
        kind = self.path.suffix.lower().removeprefix(".")
        if kind == "mp4":
            try:
                self._encoder = Mp4Encoder(self._partial, *self.size, self.fps)
            except BaseException:
                remove_partial(self._partial)
                raise
        elif kind == "png":
            self._encoder = PngEncoder()
        else:
            self._encoder = AnimationEncoder(kind, self.fps)

    def _write_frame(self, frame: np.ndarray) -> None:
        self._encoder.add(frame)

    def _commit(self) -> None:
        self._encoder.save(self._partial, self._record())
        self.path = rename_into_place(self._partial, self.path, self.overwrite)

    def _clean_up(self) -> None:
        try:
            self._encoder.close()
        finally:
            remove_partial(self._partial)


class SequenceWriter(VideoWriter):
    """One png per frame, numbered from 0; frame 0 has the metadata.

    Frames are written under temporary names and renamed together at the end.
    """

    def _open(self) -> None:
        folder = self.path.parent
        self._new_folder = not folder.exists()
        folder.mkdir(exist_ok=True)
        self._partials: list[Path] = []
        self._first: np.ndarray | None = None

    def _write_frame(self, frame: np.ndarray) -> None:
        partial = partial_name(self.path)
        self._partials.append(partial)
        if self.num_frames == 0:
            self._first = frame.copy()  # saved last, when its metadata is known
        else:
            save_png(frame, partial, None)

    def _commit(self) -> None:
        assert self._first is not None, "there is a first frame"
        save_png(self._first, self._partials[0], self._record())
        for partial in self._partials:
            fsync(partial)
        existing = existing_files(self.path)
        if existing and not self.overwrite:
            self.path = next(p for p in free_names(self.path) if not existing_files(p))
            logger.warning("%s appeared meanwhile; writing %s", existing[0], self.path)
        targets = [frame_path(self.path, i) for i in range(self.num_frames)]
        # The first frame is renamed last: a sequence without it was left by a killed run.
        for partial, target in reversed(list(zip(self._partials, targets, strict=True))):
            partial.replace(target)
        self._new_folder = False
        for stale in set(existing) - set(targets):
            if self.overwrite:
                stale.unlink()

    def _clean_up(self) -> None:
        for partial in self._partials:
            remove_partial(partial)
        folder = self.path.parent
        if self._new_folder and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_sidecar(path: str | Path, record: Mapping[str, Any], overwrite: bool = False) -> Path:
    """Write `record` as JSON beside the video `path`; return the path of the JSON file."""
    import json

    with atomic_write(sidecar_path(Path(path)), overwrite) as file:
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        file.partial.write_text(text, encoding="utf-8")
    return file.path


def save_frames(
    path: str | Path,
    frames: np.ndarray,
    fps: float,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write uint8 frames [F, H, W, 3] and return the path of the file."""
    num_frames, height, width, _ = frames.shape
    check_format(Path(path), num_frames=num_frames)
    with open_writer(path, width, height, fps, metadata, overwrite) as writer:
        writer.write(frames)
    return writer.path
