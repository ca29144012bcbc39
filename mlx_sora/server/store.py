"""The database of the server: jobs, their events, and uploads.

SQLite in WAL mode. A change of a job's state is on the disk when its method returns; progress and
events may lose their last second in a power cut.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.server.task import NotFoundError, PlanSummary, Task, Upload

#: States of a job. A worker has the running one; a cancelled one can be resumed.
QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
STATES = (QUEUED, RUNNING, DONE, FAILED, CANCELLED)

#: State of a job whose files are being removed. Only `deleted` shows it.
_DELETED = "deleted"

#: Version of the tables; others are refused.
VERSION = 1

_TABLES = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, state TEXT NOT NULL, rank REAL NOT NULL, data TEXT NOT NULL
);
CREATE INDEX jobs_by_state ON jobs (state, rank);
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL, at REAL NOT NULL, data TEXT NOT NULL
);
CREATE TABLE uploads (id TEXT PRIMARY KEY, data TEXT NOT NULL);
"""

#: A row of a job, and its place among those that wait.
_SELECT = """
SELECT id, state, data, CASE state WHEN 'queued' THEN
    (SELECT COUNT(*) FROM jobs AS other WHERE other.state = 'queued' AND other.rank < jobs.rank)
END FROM jobs"""

#: fullfsync (macOS): on the disk, not in its cache. cache_size: KiB. wal_autocheckpoint: pages of
#: the journal after which it is written into the database, and begins again.
_PRAGMAS = ("journal_mode=WAL", "fullfsync=ON", "cache_size=-512", "wal_autocheckpoint=100")


@dataclass(frozen=True)
class JobError:
    """Reason why a job failed, what to do, and the exit code of its worker."""

    message: str
    fix: str = ""
    exit_code: int = 1


@dataclass(frozen=True)
class Job:
    """One task in the queue, or behind it.

    position: place among those that wait, from 0. Times are seconds since 1970. progress: 0 to 1.
    stage: encode, read, denoise or decode while it runs, "memory" while it waits for that. step,
    steps: of denoising. output: name of the file in the folder of videos. parent, parent_kind: the
    job that this one follows from, and how: remix, edit, extend or repeat. worker: process and
    its start time, of a running job.
    """

    id: str
    task: Task
    state: str = QUEUED
    position: int | None = None
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    model: str = ""
    progress: float = 0.0
    stage: str = ""
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    peak_memory: int | None = None
    warnings: tuple[str, ...] = ()
    error: JobError | None = None
    parent: str | None = None
    parent_kind: str | None = None
    attempts: int = 0
    output: str = ""
    plan: PlanSummary | None = None
    worker: tuple[int, float] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """Return the job of `to_dict`; unknown keys are left out."""
        known = {f.name for f in fields(cls)}
        found = {name: value for name, value in values.items() if name in known}
        found["task"] = Task.from_dict(found["task"])
        found["warnings"] = tuple(found.get("warnings", ()))
        if found.get("error") is not None:
            found["error"] = JobError(**found["error"])
        if found.get("plan") is not None:
            found["plan"] = PlanSummary.from_dict(found["plan"])
        if found.get("worker") is not None:
            found["worker"] = tuple(found["worker"])
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"task": self.task.to_dict()}


class Store:
    """The database of a folder. Its methods may be called from any thread.

    Readers have a connection of their own, so that none waits for a disk that writes.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises UsageError for another version, sqlite3.DatabaseError."""
        self._path = path
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        self._writer = _connect(path)
        try:
            self._prepare()
            self._reader = _connect(path)
        except BaseException:
            self._writer.close()  # later it would remove the journal of whatever has its name
            raise
        self.changed = threading.Condition()
        self.closed = False

    def close(self) -> None:
        """Close the file."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    def _prepare(self) -> None:
        with self._write_lock, _transaction(self._writer):
            (version,) = self._writer.execute("PRAGMA user_version").fetchone()
            tables = self._writer.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            if version == 0 and tables == 0:
                for statement in _TABLES.split(";"):
                    self._writer.execute(statement)
                self._writer.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise UsageError(
                    f"{self._path} is of version {version}, this mlx_sora reads {VERSION}.",
                    "Update mlx_sora, or rename the file: the videos beside it are taken in again.",
                )
        problem = self._writer.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)

    @contextmanager
    def _write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Yield the connection inside a transaction. durable: on the disk afterwards."""
        with self._write_lock:
            try:
                self._writer.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                with _transaction(self._writer):
                    yield self._writer
            except sqlite3.OperationalError as error:
                raise _explained(self._path, error) from error

    def _read(self, query: str, *values: Any) -> Sequence[Any]:
        with self._read_lock:
            return self._reader.execute(query, values).fetchall()

    def add(self, job: Job, limit: int | None = None) -> Job | None:
        """Add a job at the end of the queue; None if `limit` jobs wait already."""
        with self._write() as db:
            waiting = "SELECT COUNT(*), COALESCE(MAX(rank), 0) FROM jobs WHERE state = 'queued'"
            count, last = db.execute(waiting).fetchone()
            if limit is not None and job.state == QUEUED and count >= limit:
                return None
            values = (job.id, job.state, last + 1, _json(job.to_dict()))
            db.execute("INSERT INTO jobs (id, state, rank, data) VALUES (?, ?, ?, ?)", values)
        return self.get(job.id)

    def get(self, id: str) -> Job:
        """Return a job. Raises NotFoundError."""
        rows = self._read(f"{_SELECT} WHERE id = ? AND state != '{_DELETED}'", id)
        if not rows:
            raise _no_video(id)
        return _job(rows[0])

    def list(
        self,
        limit: int = 20,
        after: str | None = None,
        order: str = "desc",
        states: Sequence[str] = (),
    ) -> Sequence[Job]:
        """Return jobs by the time of their submission, `desc` newest first.

        after: identifier of the job before the first. states: only jobs in these.
        """
        conditions, values = [f"state != '{_DELETED}'"], list[Any]()
        if after is not None:
            conditions.append("id > ?" if order == "asc" else "id < ?")
            values.append(after)
        if states:
            conditions.append(f"state IN ({', '.join('?' * len(states))})")
            values += states
        where, direction = " AND ".join(conditions), "ASC" if order == "asc" else "DESC"
        query = f"{_SELECT} WHERE {where} ORDER BY id {direction} LIMIT ?"
        return [_job(row) for row in self._read(query, *values, limit)]

    def next(self) -> Job | None:
        """Return the first job that waits, or None."""
        rows = self._read(f"{_SELECT} WHERE state = 'queued' ORDER BY rank LIMIT 1")
        return _job(rows[0]) if rows else None

    def update(
        self, id: str, *, when: Sequence[str] = STATES, durable: bool = True, **changes: Any
    ) -> Job | None:
        """Change fields of a job; return it, or None if its state is none of `when`.

        A job that becomes queued goes to the end of the queue. Raises NotFoundError.
        """
        with self._write(durable=durable) as db:
            row = db.execute("SELECT state, data, rank FROM jobs WHERE id = ?", (id,)).fetchone()
            if row is None or row[0] == _DELETED:
                raise _no_video(id)
            state, data, rank = row
            if state not in when:
                return None
            values = json.loads(data) | {n: _plain(value) for n, value in changes.items()}
            if values["state"] == QUEUED != state:
                last = "SELECT COALESCE(MAX(rank), 0) FROM jobs WHERE state = 'queued'"
                rank = db.execute(last).fetchone()[0] + 1
            query = "UPDATE jobs SET state = ?, data = ?, rank = ? WHERE id = ?"
            db.execute(query, (values["state"], _json(values), rank, id))
        return Job.from_dict(values)

    def put_first(self, id: str) -> None:
        """Put a job that waits before all others."""
        with self._write() as db:
            first = "SELECT COALESCE(MIN(rank), 0) FROM jobs WHERE state = 'queued'"
            db.execute(f"UPDATE jobs SET rank = ({first}) - 1 WHERE id = ?", (id,))

    def move(self, id: str, before: str | None) -> bool:
        """Put a waiting job before another, None: at the end. False if either does not wait."""
        with self._write() as db:
            rows = db.execute("SELECT id FROM jobs WHERE state = 'queued' ORDER BY rank")
            order = [row[0] for row in rows]
            if id not in order or (before is not None and before not in order):
                return False
            if id != before:
                order.remove(id)
                order.insert(len(order) if before is None else order.index(before), id)
            numbers = [(number, name) for number, name in enumerate(order)]
            db.executemany("UPDATE jobs SET rank = ? WHERE id = ?", numbers)
        return True

    def hide(self, id: str) -> None:
        """Mark a job as deleted, so that its files can be removed before it is."""
        self.update(id, state=_DELETED)

    def deleted(self) -> Sequence[str]:
        """Return the identifiers of the jobs that are marked as deleted."""
        return [row[0] for row in self._read("SELECT id FROM jobs WHERE state = ?", _DELETED)]

    def known(self) -> set[str]:
        """Return the identifiers of all jobs, the deleted ones included."""
        return {row[0] for row in self._read("SELECT id FROM jobs")}

    def delete(self, id: str) -> None:
        """Remove a job and its events."""
        with self._write() as db:
            db.execute("DELETE FROM jobs WHERE id = ?", (id,))
            db.execute("DELETE FROM events WHERE job = ?", (id,))

    def add_event(self, id: str, event: Mapping[str, Any]) -> None:
        """Record an event of a job, and wake those who wait for one."""
        with self._write(durable=False) as db:
            values = (id, time.time(), _json(event))
            db.execute("INSERT INTO events (job, at, data) VALUES (?, ?, ?)", values)
        with self.changed:
            self.changed.notify_all()

    def events(
        self, after: int = 0, id: str | None = None, limit: int = 500
    ) -> Sequence[dict[str, Any]]:
        """Return recorded events behind number `after`, of one job or of all, oldest first."""
        condition, values = "number > ?", list[Any]([after, limit])
        if id is not None:
            condition, values = "number > ? AND job = ?", [after, id, limit]
        query = (
            f"SELECT number, job, at, data FROM events WHERE {condition} ORDER BY number LIMIT ?"
        )
        rows = self._read(query, *values)
        return [{"number": n, "id": job, "at": at, **json.loads(data)} for n, job, at, data in rows]

    def wait_for_events(
        self, after: int, id: str | None, timeout: float
    ) -> Sequence[dict[str, Any]]:
        """Return events behind `after`, once there are any; none after `timeout` seconds."""
        end = time.monotonic() + timeout
        with self.changed:
            while not (found := self.events(after, id)):
                left = end - time.monotonic()
                if left <= 0 or self.closed:
                    break
                self.changed.wait(left)
        return found

    def last_event(self) -> int:
        """Return the number of the newest event; 0 without any."""
        return int(self._read("SELECT COALESCE(MAX(number), 0) FROM events")[0][0])

    def drop_events(self, limit: int) -> None:
        """Remove all but the newest `limit` events."""
        with self._write(durable=False) as db:
            newest = "SELECT MAX(number) FROM events"
            db.execute(f"DELETE FROM events WHERE number <= ({newest}) - ?", (limit,))

    def add_upload(self, upload: Upload) -> None:
        """Record an upload."""
        with self._write() as db:
            values = (upload.id, _json(asdict(upload)))
            db.execute("INSERT INTO uploads (id, data) VALUES (?, ?)", values)

    def get_upload(self, id: str) -> Upload:
        """Return an upload. Raises NotFoundError."""
        rows = self._read("SELECT data FROM uploads WHERE id = ?", id)
        if not rows:
            raise NotFoundError(f"There is no file {str(id)[:60]!r}.", "POST /v1/files adds one.")
        return Upload(**json.loads(rows[0][0]))

    def uploads(self) -> Sequence[Upload]:
        """Return all uploads, oldest first."""
        return [
            Upload(**json.loads(data))
            for (data,) in self._read("SELECT data FROM uploads ORDER BY id")
        ]

    def delete_upload(self, id: str) -> None:
        """Remove the record of an upload."""
        with self._write() as db:
            db.execute("DELETE FROM uploads WHERE id = ?", (id,))


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    try:
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _no_video(id: str) -> NotFoundError:
    return NotFoundError(f"There is no video {id[:60]!r}.", "GET /v1/videos lists all.")


def _explained(path: Path, error: sqlite3.OperationalError) -> MlxSoraError:
    if "full" in str(error):
        return MlxSoraError(f"Cannot write {path}: the disk is full.", "Make room there.")
    return MlxSoraError(f"Cannot write {path}: {error}.", "Check its disk and its rights.")


def _job(row: Sequence[Any]) -> Job:
    id, state, data, position = row
    return Job.from_dict(json.loads(data) | {"id": id, "state": state, "position": position})


def _plain(value: Any) -> Any:
    if isinstance(value, Task | PlanSummary):
        return value.to_dict()
    return asdict(value) if isinstance(value, JobError) else value


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, separators=(",", ":"))
