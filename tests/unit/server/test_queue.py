"""JobQueue: jobs in, in another order, and out again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_sora.errors import UsageError
from mlx_sora.server.queue import JobQueue, Limits
from mlx_sora.server.task import ConflictError, NotFoundError, QueueFullError, Task


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    """A queue that nothing works on."""
    opened = JobQueue(tmp_path, Limits(queued=3))
    yield opened
    opened.stop()


def red(**options: object) -> Task:
    """Return a task of one frame."""
    return Task(options={"prompt": "a red circle", "num_frames": 1, **options})


def test_jobs_come_back_as_they_were_sent(queue: JobQueue) -> None:
    job = queue.submit(red(seed=3, images=[]))
    assert job.id.startswith("video_")
    assert len(job.id) == 32
    assert queue.get(job.id) == job
    assert job.task.options == {"prompt": "a red circle", "num_frames": 1, "seed": 3}


def test_order(queue: JobQueue) -> None:
    first, second, third = (queue.submit(red()) for _ in range(3))
    assert [job.id for job in queue.list()] == [third.id, second.id, first.id]
    assert [job.id for job in queue.list(order="asc", limit=1, after=first.id)] == [second.id]
    queue.move(third.id, first.id)
    assert [queue.get(job.id).position for job in (first, second, third)] == [1, 2, 0]
    with pytest.raises(QueueFullError, match="3 videos wait already"):
        queue.submit(red())
    assert queue.cancel(third.id).state == "cancelled"
    with pytest.raises(ConflictError, match="is cancelled"):
        queue.cancel(third.id)
    assert queue.resume(third.id).position == 2
    queue.delete(first.id)
    with pytest.raises(NotFoundError):
        queue.get(first.id)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"stepz": 3}, "Did you mean steps"),
        ({"output": "/etc/a.mp4"}, "unknown output format"),
        ({"images": ["/etc/passwd"]}, "is no file of the server"),
        ({"references": ["/etc/passwd"]}, "The server decides about references"),
        ({"prompt": 'x{"reference_path": "/etc/passwd"}'}, "no settings in the prompt"),
        ({"model": "../model"}, "has to be a name"),
        ({"step_cache": "table:computed=3,file=/etc/passwd"}, "no file of a step cache"),
    ],
)
def test_bad_tasks_are_refused(queue: JobQueue, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        queue.submit(red(**options))
    assert queue.list() == []


def test_events_can_be_followed_and_replayed(queue: JobQueue) -> None:
    job = queue.submit(red())
    replayed = queue.subscribe(after=0, timeout=0.01)
    assert next(replayed) == {**queue.events()[0], "event": "job", "state": "queued", "id": job.id}
    assert next(replayed) is None
    queue.cancel(job.id)
    event = next(replayed)
    assert event is not None
    assert event["state"] == "cancelled"
