"""Opening a folder after whatever happened to it: the database, jobs without an end, lost rows."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_sora.errors import MlxSoraError
from mlx_sora.server.checks import source_id
from mlx_sora.server.folder import Folder
from mlx_sora.server.helper import Helper
from mlx_sora.server.processes import end_process
from mlx_sora.server.store import (
    CANCELLED,
    DONE,
    FAILED,
    QUEUED,
    RUNNING,
    Job,
    JobError,
    Store,
)
from mlx_sora.server.task import EDIT, GENERATE, Task, Upload
from mlx_sora.video.output_path import CHECKPOINT_SUFFIX, SUFFIXES

logger = logging.getLogger(__name__)

#: Rows that are looked for in a damaged database.
_MAX_ROWS = 100_000


def open_store(folder: Folder, notices: list[str]) -> Store:
    """Open the database. A damaged one is set aside under another name, and read as far as it goes.

    Raises UsageError for another version, MlxSoraError if the file cannot be written.
    """
    path = folder.database
    try:
        return Store(path)
    except sqlite3.OperationalError as error:
        if "malformed" not in str(error) and "not a database" not in str(error):
            raise MlxSoraError(
                f"Cannot open {path}: {error}.", "Check its disk and rights."
            ) from error
        reason = str(error)
    except sqlite3.DatabaseError as error:
        reason = str(error)
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).replace(aside.with_name(aside.name + suffix))
    store = Store(path)
    jobs, uploads = 0, 0
    for table, values in _readable_rows(aside):
        with suppress(MlxSoraError, ValueError, TypeError, LookupError, sqlite3.Error):
            if table == "jobs":
                store.add(Job.from_dict(values))
                jobs += 1
            else:
                store.add_upload(Upload(**values))
                uploads += 1
    notices.append(
        f"{path} was damaged ({reason.splitlines()[0]}) and is now {aside.name}: "
        f"{jobs} jobs and {uploads} uploads were read from it."
    )
    return store


def _readable_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what can still be read of a damaged database, row by row."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA writable_schema = ON")  # reads a file that was cut short, too
        for table in ("jobs", "uploads"):
            rowid, column = 0, "state" if table == "jobs" else "NULL"
            query = f"SELECT rowid, id, {column}, data FROM {table} WHERE rowid > ? LIMIT 1"
            for _ in range(_MAX_ROWS):
                try:
                    row = database.execute(query, (rowid,)).fetchone()
                except sqlite3.DatabaseError:
                    rowid += 1  # perhaps the next one is on another page
                    continue
                if row is None:
                    break
                rowid = row[0]
                with suppress(ValueError, TypeError):
                    values = json.loads(row[3]) | {"id": row[1]}
                    yield table, values | ({"state": row[2]} if table == "jobs" else {})


def recover(folder: Folder, store: Store, helper: Helper, notices: list[str]) -> None:
    """Make files and database agree: finish what was under way, and take in what has no row.

    No other server may use the folder.
    """
    running = store.list(limit=-1, states=(RUNNING,))
    for job in running:
        end_process(job.worker)
    folder.remove_partials()
    for job in running:
        if not folder.video(job).is_file():
            _set_state(store, job, QUEUED)
            store.put_first(job.id)
    for id in store.deleted():
        folder.remove_job(Job(id, Task(), output=id))
        store.delete(id)
    for job in store.list(limit=-1):
        has_video = folder.video(job).is_file()
        if has_video and job.state != DONE:
            _set_state(store, job, DONE)
            folder.remove_run(job)
        elif job.state == DONE and not has_video:
            error = JobError(f"The file {job.output} is gone.", "Repeat it, or delete it.")
            store.update(job.id, state=FAILED, error=error)
    _take_in(folder, store, helper, notices)


def _set_state(store: Store, job: Job, state: str) -> None:
    changes: dict[str, Any] = {"worker": None, "seconds_left": None, "stage": ""}
    if state == DONE:
        changes |= {"progress": 1.0, "error": None, "finished_at": time.time()}
    store.update(job.id, state=state, **changes)
    store.add_event(job.id, {"event": "job", "state": state})


def _take_in(folder: Folder, store: Store, helper: Helper, notices: list[str]) -> None:
    """Add jobs for videos and checkpoints that no row names, from their own records."""
    known, count = store.known(), 0
    for path in sorted(folder.videos.glob("video_*")):
        id, suffix = path.name.split(".", 1)[0], path.suffix.lower()
        is_checkpoint = path.name.endswith(CHECKPOINT_SUFFIX)
        is_video = suffix in SUFFIXES and path.stem == id
        if id in known or not (is_video or is_checkpoint):
            continue
        try:
            found = _from_video(helper, path) if is_video else _from_checkpoint(helper, path)
        except MlxSoraError as error:
            logger.warning("%s", error)
            continue
        store.add(replace(found, id=id, created_at=path.stat().st_mtime))
        known.add(id)
        count += 1
    files = {upload.id for upload in store.uploads()}
    for path in sorted(folder.uploads.glob("file-*")):
        if path.name in files:
            continue
        try:
            found_upload = helper.call("probe", path=str(path))
        except MlxSoraError as error:
            logger.warning("%s", error)
            continue
        store.add_upload(Upload(path.name, **found_upload, created_at=path.stat().st_mtime))
        count += 1
    if count:
        notices.append(f"{count} files of {folder.path} without an entry were taken in again.")


def _from_video(helper: Helper, path: Path) -> Job:
    """Return the finished job of a video. Without a record it has no prompt."""
    options: dict[str, Any] = helper.call("probe", path=str(path))["request"] or {}
    kind = EDIT if "source_prompt" in options else GENERATE
    model = str(options.get("model") or "")
    task = Task(kind, options | {"output": path.suffix[1:].lower()})
    return Job("", task, DONE, model=model, progress=1.0, output=path.name)


def _from_checkpoint(helper: Helper, path: Path) -> Job:
    """Return the cancelled job of a checkpoint, which can be resumed."""
    found = helper.call("checkpoint", path=str(path))
    output = path.name.removesuffix(CHECKPOINT_SUFFIX)
    server = ("checkpoint_every", "preview_every", "memory_budget")
    options = {n: value for n, value in found["request"].items() if n not in server}
    for name in ("images", "videos"):
        if name in options:
            options[name] = [[source_id(item[0]), *item[1:]] for item in options[name]]
    task = Task(GENERATE, options | {"output": Path(output).suffix[1:].lower()})
    return Job("", task, CANCELLED, model=str(found["model"] or ""), output=output)
