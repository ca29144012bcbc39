"""Video writers: frames are written as they are decoded; the finished file appears at the end."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import MlxSoraError
from mlx_sora.geometry import Size
from mlx_sora.utils.files import (
    atomic_write,
    explain_os_errors,
    free_names,
    new_folders,
    partial_name,
    recover,
    remove_partial,
    rename_all,
    rename_into_place,
)
from mlx_sora.utils.leftovers import deferred_signals
from mlx_sora.video.encoders import (
    FILMS,
    AnimationEncoder,
    FilmEncoder,
    FrameEncoder,
    PngEncoder,
    save_png,
)
from mlx_sora.video.output_path import (
    check_format,
    check_output,
    existing_files,
    frame_files,
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
    scale: int = 1,
) -> VideoWriter:
    """Open a writer for the kind of file that `path` names. Use it in a `with` block.

    width, height: of the frames that it gets; it enlarges them `scale` times. check: call
    `check_output` first, which raises UsageError. Without it, a file that has appeared since an
    earlier check is not an error. Raises MlxSoraError if the file system refuses.
    """
    path = Path(path)
    if check:
        check_output(path, overwrite, size=Size(width, height).enlarged(scale), fps=fps)
    with explain_os_errors(path):
        kind = SequenceWriter if is_sequence(path) else FileWriter
        return kind(path, (width, height), fps, metadata, overwrite, scale)


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
        scale: int = 1,
    ) -> None:
        self.path, self.size, self.fps, self.scale = path, size, fps, scale
        self.metadata = metadata
        self.overwrite = overwrite
        self.num_frames = 0
        self._finished = False
        with ExitStack() as opened:
            opened.enter_context(new_folders(path.parent))
            recover(path.parent)
            self._open()
            self._folders = opened.pop_all()

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
                self._write_frame(enlarge(frame, self.scale))
                self.num_frames += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self.finish()
                with explain_os_errors(self.path), deferred_signals():
                    self._commit()
        finally:
            self._clean_up()
            self._folders.close()

    def finish(self) -> None:
        """Encode what is left, under temporary names; the end of the block only renames."""
        if not self.num_frames:
            raise MlxSoraError("No frame was decoded, so nothing was written.")
        if not self._finished:
            with explain_os_errors(self.path):
                self._finish()
        self._finished = True

    def _record(self) -> dict[str, Any] | None:
        return None if self.metadata is None else dict(self.metadata)

    @abstractmethod
    def _open(self) -> None:
        """Prepare for the first frame."""

    @abstractmethod
    def _write_frame(self, frame: np.ndarray) -> None:
        """Write frame number `num_frames`, uint8 [H, W, 3], enlarged already."""

    @abstractmethod
    def _finish(self) -> None:
        """Complete the partial files."""

    @abstractmethod
    def _commit(self) -> None:
        """Rename the finished file into place."""

    @abstractmethod
    def _clean_up(self) -> None:
        """Free everything and remove partial files; also called after `_commit`."""


class FileWriter(VideoWriter):
    """One file: mp4, mov, webm, gif, webp, or png of a single frame."""

    def _open(self) -> None:
        self._partial = partial_name(self.path)
        self._encoder: FrameEncoder
        suffix = self.path.suffix.lower()
        if (film := FILMS.get(suffix)) is not None:
            try:
                size = Size(*self.size).enlarged(self.scale)
                self._encoder = FilmEncoder(self._partial, film, size, self.fps)
            except BaseException:
                remove_partial(self._partial)
                raise
        elif suffix == ".png":
            self._encoder = PngEncoder()
        else:
            self._encoder = AnimationEncoder(suffix.removeprefix("."), self.fps)

    def _write_frame(self, frame: np.ndarray) -> None:
        self._encoder.add(frame)

    def _finish(self) -> None:
        self._encoder.save(self._partial, self._record())

    def _commit(self) -> None:
        self.path = rename_into_place(self._partial, self.path, self.overwrite)

    def _clean_up(self) -> None:
        try:
            self._encoder.close()
        finally:
            remove_partial(self._partial)


class SequenceWriter(VideoWriter):
    """One png per frame, numbered from 0; frame 0 has the metadata.

    Frames are written under temporary names and renamed together at the end, all or none.
    """

    def _open(self) -> None:
        self._partials: list[Path] = []
        self._first: np.ndarray | None = None

    def _write_frame(self, frame: np.ndarray) -> None:
        partial = partial_name(self.path)
        self._partials.append(partial)
        if self.num_frames == 0:
            self._first = frame.copy()  # saved last, when its metadata is known
        else:
            save_png(frame, partial, None)

    def _finish(self) -> None:
        assert self._first is not None, "there is a first frame"
        save_png(self._first, self._partials[0], self._record())

    def _commit(self) -> None:
        self.path = rename_frames(self.path, self._partials, self.overwrite)

    def _clean_up(self) -> None:
        for partial in self._partials:
            remove_partial(partial)


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """Repeat each pixel of frames [..., H, W, 3] `scale` times in both directions."""
    return frames if scale == 1 else frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def rename_frames(path: Path, partials: Sequence[Path], overwrite: bool) -> Path:
    """Rename the frames of a sequence into place, all or none; return its pattern.

    Without `overwrite`, and where an existing frame cannot be replaced, that is a free one.
    """

    def rename(pattern: Path, replaced: Sequence[Path]) -> bool:
        targets = [frame_path(pattern, i) for i in range(len(partials))]
        try:
            rename_all(dict(zip(targets, partials, strict=True)), replaced)
        except FileExistsError:
            return False
        return True

    existing, found = existing_files(path), frame_files(path)
    try:
        if (overwrite or not existing) and rename(path, found):
            return path
        reason = "appeared meanwhile"
    except OSError as error:
        if not found or not all(partial.exists() for partial in partials):
            raise
        reason = f"cannot be replaced ({error.strerror})"
    others = free_names(path)
    while frame_files(pattern := next(others)) or not rename(pattern, ()):
        pass
    logger.warning("%s %s; wrote %s", found[0] if found else path, reason, pattern)
    return pattern


def write_encoded_frames(path: Path, frames: Iterable[bytes], overwrite: bool) -> Path:
    """Write a sequence from the contents of its png files, all or none; return its pattern."""
    partials: list[Path] = []
    with new_folders(path.parent):
        try:
            for frame in frames:
                partials.append(partial_name(path))
                partials[-1].write_bytes(frame)
            with deferred_signals():
                return rename_frames(path, partials, overwrite)
        finally:
            for partial in partials:
                remove_partial(partial)


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
