"""Pictures and videos that clients send."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import IO, Any

from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.request.options import as_text
from mlx_sora.server.checks import source_ids
from mlx_sora.server.folder import Folder
from mlx_sora.server.helper import Helper
from mlx_sora.server.store import Store
from mlx_sora.server.task import ConflictError, Upload, new_id
from mlx_sora.utils.files import explain_os_errors, fsync

#: Bytes read at a time; longest name of a file.
_BLOCK, _MAX_NAME = 1 << 20, 200

#: Bytes of the disk that no upload takes.
_SPARE = 500_000_000


class TooLargeError(UsageError):
    """More bytes than the server takes."""


def add_upload(
    folder: Folder, store: Store, helper: Helper, stream: IO[bytes], limit: int, name: str
) -> Upload:
    """Write a stream of `limit` bytes at most to a file, and read it as all media are.

    The name is for people only. Raises TooLargeError, UsageError, MlxSoraError.
    """
    id = new_id("file-")
    partial, path = folder.uploads / f".{id}.partial", folder.uploads / id
    with explain_os_errors(partial):
        try:
            with partial.open("wb") as file:
                _copy(stream, file, limit)
            found = _probe(helper, partial, name)
            fsync(partial)
            partial.replace(path)
            fsync(folder.uploads)
        finally:
            partial.unlink(missing_ok=True)
    upload = Upload(id, **found, name=name[:_MAX_NAME], created_at=time.time())
    try:
        store.add_upload(upload)
    except MlxSoraError:
        path.unlink(missing_ok=True)
        raise
    return upload


def _copy(stream: IO[bytes], file: IO[bytes], limit: int) -> None:
    size = 0
    while block := stream.read(_BLOCK):
        size += len(block)
        if size > limit:
            raise TooLargeError(f"The file has over {limit / 1e6:.0f} MB.", "Cut or scale it.")
        file.write(block)


def _probe(helper: Helper, path: Path, name: str) -> dict[str, Any]:
    as_text(name)
    try:
        return helper.call("probe", path=str(path))
    except MlxSoraError as error:
        message, fix = (t.replace(str(path), "the file") for t in (error.message, error.fix))
        raise UsageError(message[:1].upper() + message[1:], fix) from None


def make_room(folder: Folder, store: Store, limit: int) -> None:
    """Remove the oldest uploads that no job names until all have fewer than `limit` bytes.

    Raises TooLargeError if that is not enough, or if the disk is nearly full.
    """
    used = {id for job in store.list(limit=-1) for id in source_ids(job.task)}
    sizes = {path.name: path.stat().st_size for path in folder.uploads.glob("file-*")}
    for upload in store.uploads():
        if sum(sizes.values()) < limit:
            break
        if upload.id not in used:
            remove_upload(folder, store, upload.id)
            sizes.pop(upload.id, None)
    if sum(sizes.values()) >= limit or shutil.disk_usage(folder.path).free < _SPARE:
        raise TooLargeError(
            "There is no room for uploads.", "Delete videos that were made of some."
        )


def delete_upload(folder: Folder, store: Store, id: str) -> None:
    """Remove an upload. Raises NotFoundError, and ConflictError if a job waits for it."""
    store.get_upload(id)
    check_unused(store, id)
    remove_upload(folder, store, id)


def check_unused(store: Store, id: str) -> None:
    """Raise ConflictError if a job that waits or runs needs an upload or video."""
    for job in store.list(limit=-1, states=("queued", "running")):
        if id in source_ids(job.task):
            raise ConflictError(f"{job.id} still needs {id}.", "Cancel or delete that one first.")


def remove_upload(folder: Folder, store: Store, id: str) -> None:
    """Remove the file of an upload, its pictures and its record."""
    (folder.uploads / id).unlink(missing_ok=True)
    folder.remove_pictures(id)
    store.delete_upload(id)
