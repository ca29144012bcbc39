"""The folder of a server: where its files lie, and the lock that keeps a second server out."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.errors import UsageError
from mlx_sora.utils.files import explain_os_errors, name_hash
from mlx_sora.video.output_path import checkpoint_path
from mlx_sora.video.preview import preview_path

if TYPE_CHECKING:
    from filelock import FileLock

    from mlx_sora.server.store import Job

DATABASE, LOCK = "jobs.db", ".lock"

#: Formats of what is made from videos.
THUMBNAIL, SPRITESHEET, RECORD = ".webp", ".jpg", ".json"


class Folder:
    """The folder of a server: jobs.db, videos/ with checkpoints, pictures/, uploads/."""

    def __init__(self, path: Path) -> None:
        """Make what is missing. Raises MlxSoraError if it cannot be written."""
        self.path = path.absolute()
        self.videos, self.pictures = self.path / "videos", self.path / "pictures"
        self.uploads = self.path / "uploads"
        self._lock: FileLock | None = None
        with explain_os_errors(self.path):
            for folder in (self.videos, self.pictures, self.uploads):
                folder.mkdir(parents=True, exist_ok=True)

    def lock(self) -> None:
        """Keep other servers out until this process ends. Raises UsageError."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK, timeout=0, thread_local=False, is_singleton=False)
        with explain_os_errors(self.path / LOCK):
            try:
                lock.acquire()
            except Timeout:  # an OSError
                raise UsageError(
                    f"Another server uses {self.path}.", "Stop it, or give another --folder."
                ) from None
        self._lock = lock

    def unlock(self) -> None:
        """Let other servers in."""
        if self._lock is not None:
            self._lock.release()

    @property
    def database(self) -> Path:
        """Path of the database."""
        return self.path / DATABASE

    def video(self, job: Job) -> Path:
        """Return the path of a job's video; it may not exist yet."""
        return self.videos / job.output

    def checkpoint(self, job: Job) -> Path:
        """Return the path of a job's checkpoint; it may not exist."""
        return checkpoint_path(self.video(job))

    def preview(self, job: Job) -> Path:
        """Return the path of a job's preview; it may not exist."""
        return preview_path(self.video(job), 0 if job.plan is None else job.plan.frames)

    def picture(self, id: str, suffix: str) -> Path:
        """Return the path of a thumbnail, spritesheet or record; it may not exist."""
        return self.pictures / (id + suffix)

    def remove_run(self, job: Job) -> None:
        """Remove what a run leaves beside its finished video, if it was killed right then."""
        _remove(self.checkpoint(job))
        _remove(self.preview(job))

    def remove_job(self, job: Job) -> None:
        """Remove the files of a job, also what a killed worker has left of them."""
        for path in self.videos.glob(f"{job.id}.*"):
            _remove(path)
        for path in self.videos.glob(f".{name_hash(self.video(job))}*"):
            _remove(path)
        for path in self.videos.glob(f".{name_hash(self.checkpoint(job))}*"):
            _remove(path)
        self.remove_pictures(job.id)

    def remove_pictures(self, id: str) -> None:
        """Remove what was made to show a video or an upload."""
        for path in self.pictures.glob(f"{id}.*"):
            _remove(path)

    def remove_partials(self) -> None:
        """Remove the unfinished files of killed processes. No worker may be at work."""
        for folder in (self.videos, self.pictures, self.uploads):
            for path in (*folder.glob(".*.partial"), *folder.glob(".*.lock")):
                _remove(path)

    def hide_paths(self, value: Any) -> Any:
        """Return JSON values without the paths of this folder, for clients."""
        text = json.dumps(value)
        for folder in (self.videos, self.uploads, self.path):
            text = text.replace(json.dumps(str(folder))[1:-1] + "/", "")
        return json.loads(text)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
