"""What a folder looks like after a crash, a damaged database or another program, and again."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.server.queue import JobQueue
from tests.helpers.queue import FAKES, ended, open_queue, task, wait


def make_jobs(folder: Path, count: int = 3) -> list[str]:
    """Make videos in a folder; one more job waits."""
    queue = open_queue(folder)
    jobs = [ended(queue, queue.submit(task(steps=1))) for _ in range(count)]
    queue.stop()
    queue = JobQueue(folder, programs=FAKES)
    jobs.append(queue.submit(task("slow", steps=3)))
    queue.stop()
    return [job.id for job in jobs]


def states(queue: JobQueue) -> dict[str, str]:
    """Return the states of all jobs."""
    return {job.id: job.state for job in queue.list(limit=-1)}


@pytest.mark.parametrize("damage", ["half", "text", "empty", "page"])
def test_a_damaged_database_loses_no_video(tmp_path: Path, damage: str) -> None:
    ids = make_jobs(tmp_path)
    database = tmp_path / "jobs.db"
    content = database.read_bytes()
    changed = {
        "half": content[: len(content) // 2],
        "text": b"no database at all " * 500,
        "empty": b"",
        "page": content[:4096] + b"\xff" * 4096 + content[8192:],
    }
    database.write_bytes(changed[damage])
    queue = open_queue(tmp_path)
    found = states(queue)
    assert all(found[id] == "done" for id in ids[:3])
    assert all(queue.content(id).is_file() for id in ids[:3])
    if damage != "empty":
        (aside,) = tmp_path.glob("jobs.db.damaged-*")
        assert aside.read_bytes()[:1000] == changed[damage][:1000]
        assert "was damaged" in queue.notices[0]
        assert "\n" not in queue.notices[0]
    assert ended(queue, queue.submit(task())).state == "done"
    queue.stop()
    again = JobQueue(tmp_path, programs=FAKES)
    assert again.notices == []
    again.stop()


def test_a_database_of_another_version_is_left_alone(tmp_path: Path) -> None:
    make_jobs(tmp_path, 1)
    with sqlite3.connect(tmp_path / "jobs.db") as database:
        database.execute("PRAGMA user_version = 7")
    database.close()
    for _ in range(2):
        with pytest.raises(UsageError, match="is of version 7, this mlx_sora reads 1") as error:
            JobQueue(tmp_path, programs=FAKES)
    assert "rename the file" in error.value.fix
    (tmp_path / "jobs.db").rename(tmp_path / "old.db")
    queue = JobQueue(tmp_path, programs=FAKES)
    assert list(states(queue).values()) == ["done"]
    queue.stop()


def test_two_servers_cannot_share_a_folder(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path, programs=FAKES)
    with pytest.raises(UsageError, match="Another server uses"):
        JobQueue(tmp_path, programs=FAKES)
    queue.stop()
    JobQueue(tmp_path, programs=FAKES).stop()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MlxSoraError, match="Cannot write"):
        JobQueue(tmp_path / "file", programs=FAKES)


def test_videos_and_checkpoints_without_a_row_are_taken_in(tmp_path: Path) -> None:
    ids = make_jobs(tmp_path, 1)
    queue = JobQueue(tmp_path, programs=FAKES)
    unfinished = queue.get(ids[1])
    checkpoint = queue.files.checkpoint(unfinished)
    queue.stop()
    checkpoint.write_text("x,x;0")
    (tmp_path / "uploads" / ("file-" + "0" * 26)).write_text("image")
    (tmp_path / "videos" / ".left.partial").write_text("")
    (tmp_path / "jobs.db").unlink()
    queue = open_queue(tmp_path)
    assert states(queue) == {ids[0]: "done", ids[1]: "cancelled"}
    assert queue.get_upload("file-" + "0" * 26).kind == "image"
    assert "3 files" in queue.notices[0]
    assert not (tmp_path / "videos" / ".left.partial").exists()
    queue.resume(ids[1])
    assert ended(queue, unfinished).state == "done"
    assert queue.content(ids[1]).read_text() == "0 2"
    queue.stop()


def test_a_video_that_is_gone_says_so(tmp_path: Path) -> None:
    (id, _) = make_jobs(tmp_path, 1)
    next((tmp_path / "videos").glob(f"{id}.*")).unlink()
    queue = JobQueue(tmp_path, programs=FAKES)
    job = queue.get(id)
    assert job.state == "failed"
    assert job.error is not None
    assert "is gone" in job.error.message
    queue.stop()


def test_an_unfinished_deletion_is_finished(tmp_path: Path) -> None:
    (id, _) = make_jobs(tmp_path, 1)
    queue = JobQueue(tmp_path, programs=FAKES)
    queue._store.hide(id)
    queue.stop()
    queue = JobQueue(tmp_path, programs=FAKES)
    assert id not in states(queue)
    wait(lambda: not list((tmp_path / "videos").glob(f"{id}*")))
    assert queue._store.known() == set(states(queue))
    queue.stop()


def test_rows_that_can_still_be_read_are_taken_over(tmp_path: Path) -> None:
    ids = make_jobs(tmp_path)
    queue = JobQueue(tmp_path, programs=FAKES)
    for number in range(200):
        queue._store.add_event(ids[0], {"event": "note", "message": f"{number} " * 20})
    queue.stop()
    database = tmp_path / "jobs.db"
    content = database.read_bytes()
    database.write_bytes(content[: len(content) // 2])  # all of the second half are events
    queue = JobQueue(tmp_path, programs=FAKES)
    assert "4 jobs and 0 uploads were read from it" in queue.notices[0]
    assert list(states(queue).values()) == ["queued", "done", "done", "done"]
    assert {queue.get(id).task.prompt for id in ids} == {"a red circle", "slow"}
    queue.start()
    assert ended(queue, queue.get(ids[3])).state == "done"
    queue.stop()
