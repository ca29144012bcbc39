"""Sending a finished video from the rank that made it to rank 0, which writes the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_sora.distributed.group import Ranks
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.utils.files import atomic_write, explain_os_errors, new_folders
from mlx_sora.video import Video
from mlx_sora.video.output_path import frame_path, is_sequence
from mlx_sora.video.writer import write_encoded_frames

#: Fields of Video that are plain JSON values.
VIDEO_FIELDS = ("width", "height", "num_frames", "fps", "seed", "warnings", "timings", "memory")


@dataclass(frozen=True)
class VideoTransfer:
    """A video, or the error that took its place, as bytes and plain values.

    values: fields of the video. error: class, message and fix. files: contents by name; without
    files, the frames, uint8, under an empty name.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    error: tuple[str, str, str] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def from_video(cls, video: Video, folder: Path) -> VideoTransfer:
        """Pack a video whose files are all in `folder`; hidden ones belong to the run."""
        shown = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
        files = {file.name: file.read_bytes() for file in shown}
        if video.decoded is not None:
            files[""] = video.decoded.tobytes()
        values = {name: getattr(video, name) for name in (*VIDEO_FIELDS, "metadata")}
        return cls(values, files=files)

    def all_gather(self, ranks: Ranks) -> list[VideoTransfer]:
        """Return the transfers of all ranks, in order."""
        sizes = {name: len(content) for name, content in self.files.items()}
        heads = ranks.all_gather_object([self.values, self.error, sizes])
        bodies = ranks.all_gather_bytes(b"".join(self.files.values()))
        return [_unpack(head, body) for head, body in zip(heads, bodies, strict=True)]

    def deliver(self, run: GenerationRun, *, write: bool) -> Video:
        """Write the video where `run` wants it, if `write`, and return it. Raises MlxSoraError."""
        values = dict(self.values)
        values["warnings"] = tuple(values["warnings"])
        if not write:
            return Video(None, run.request, **values)
        if run.output is not None:
            return Video(
                self._write_files(run.output, run.request.overwrite), run.request, **values
            )
        import numpy as np

        shape = (values["num_frames"], values["height"], values["width"], 3)
        frames = np.frombuffer(self.files[""], np.uint8).reshape(shape)
        return Video(None, run.request, **values, decoded=frames)

    def _write_files(self, output: Path, overwrite: bool) -> Path:
        """Write all files beside `output`; return the path of the video."""
        found, files = output, dict(self.files)
        with explain_os_errors(output), new_folders(output.parent):
            if is_sequence(output):
                count = self.values["num_frames"]
                names = [frame_path(output, i).name for i in range(count)]
                found = write_encoded_frames(output, [files.pop(n) for n in names], overwrite)
            for name, content in files.items():
                with atomic_write(output.parent / name, overwrite) as file:
                    file.partial.write_bytes(content)
                if name == output.name:
                    found = file.path
        return found


def _unpack(head: list[Any], body: bytes) -> VideoTransfer:
    values, error, sizes = head
    files, start = {}, 0
    for name, size in sizes.items():
        files[name] = body[start : start + size]
        start += size
    return VideoTransfer(values, None if error is None else tuple(error), files)
