"""The database: many threads, readers beside a writer, events that are cleared away."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlx_sora.server.store import Job, Store
from mlx_sora.server.task import NotFoundError, Task, new_id


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty database."""
    opened = Store(tmp_path / "jobs.db")
    yield opened
    opened.close()


def add(store: Store, limit: int | None = None) -> Job | None:
    """Add a job that waits."""
    return store.add(Job(new_id("video_"), Task(options={"prompt": "red"})), limit)


def test_threads_share_the_queue(store: Store) -> None:
    def work(number: int) -> bool:
        job = add(store, limit=30)
        if job is None:
            return False
        store.add_event(job.id, {"event": "note"})
        store.update(job.id, durable=False, progress=0.5)
        return store.get(job.id).progress == 0.5 and len(store.list(limit=-1)) <= 30

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(60))) == 30
    assert sorted(job.position or 0 for job in store.list(limit=-1)) == list(range(30))
    assert [event["number"] for event in store.events()] == list(range(1, 31))


def test_nobody_waits_for_a_disk_that_writes(store: Store) -> None:
    job = add(store)
    assert job is not None
    with store._write() as database:
        database.execute("UPDATE jobs SET state = 'failed'")
        assert store.get(job.id).state == "queued"
        assert len(store.list()) == 1
    assert store.get(job.id).state == "failed"


def test_a_failed_change_changes_nothing(store: Store) -> None:
    job = add(store)
    assert job is not None
    with pytest.raises(TypeError):
        store.update(job.id, state="running", warnings=object())
    assert store.get(job.id).state == "queued"
    assert store.update(job.id, when=("running",), state="done") is None
    with pytest.raises(NotFoundError):
        store.update("video_", state="done")


def test_numbers_of_events_never_come_back(store: Store) -> None:
    for number in range(10):
        store.add_event("video_a" if number % 2 else "video_b", {"event": "note", "at": number})
    store.drop_events(4)
    assert [event["number"] for event in store.events()] == [7, 8, 9, 10]
    assert [event["number"] for event in store.events(7, "video_a")] == [8, 10]
    store.delete("video_a")
    store.delete("video_b")
    store.add_event("video_c", {"event": "note"})
    assert store.last_event() == 11
    assert store.wait_for_events(11, None, 0.01) == []


def test_identifiers_sort_by_time() -> None:
    ids = [new_id("video_") for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert {len(id) for id in ids} == {32}
    assert [id[:17] for id in ids] == sorted(id[:17] for id in ids)
