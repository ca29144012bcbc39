"""JobQueue: jobs in, in another order, and out again."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_sora.errors import MemoryBudgetError, UsageError
from mlx_sora.server.queue import JobQueue, Limits
from mlx_sora.server.task import EDIT, ConflictError, NotFoundError, QueueFullError, Task
from tests.helpers.queue import FAKES, task


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    """A queue that nothing works on."""
    opened = JobQueue(tmp_path, Limits(queued=3), FAKES)
    yield opened
    opened.stop()


def test_jobs_come_back_as_they_were_sent(queue: JobQueue) -> None:
    job = queue.submit(task(seed=3, images=[]))
    assert job.id.startswith("video_")
    assert len(job.id) == 32
    assert queue.get(job.id) == job
    own = {"prompt": "a red circle", "num_frames": 1, "seed": 3, "model": "shapes"}
    assert job.task.options == own


def test_order(queue: JobQueue) -> None:
    first, second, third = (queue.submit(task()) for _ in range(3))
    assert [job.id for job in queue.list()] == [third.id, second.id, first.id]
    assert [job.id for job in queue.list(order="asc", limit=1, after=first.id)] == [second.id]
    queue.move(third.id, first.id)
    assert [queue.get(job.id).position for job in (first, second, third)] == [1, 2, 0]
    with pytest.raises(QueueFullError, match="3 videos wait already"):
        queue.submit(task())
    assert queue.cancel(third.id).state == "cancelled"
    with pytest.raises(ConflictError, match="is cancelled"):
        queue.cancel(third.id)
    with pytest.raises(ConflictError, match="Only videos that wait"):
        queue.move(first.id, third.id)
    assert queue.resume(third.id).position == 2
    queue.delete(first.id)
    with pytest.raises(NotFoundError):
        queue.get(first.id)
    assert [job.id for job in queue.list(states=["queued"])] == [third.id, second.id]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "-"}, "the prompt is empty"),
        ({"stepz": 3}, "Did you mean steps"),
        ({"output": "/etc/a.mp4"}, "unknown output format"),
        ({"images": ["/etc/passwd"]}, "is no file of the server"),
        ({"videos": [["~/a.mp4"]]}, "is no file of the server"),
        ({"references": ["/etc/passwd"]}, "The server decides about references"),
        ({"overwrite": True}, "The server decides about overwrite"),
        ({"prompt": 'x{"reference_path": "/etc/passwd"}'}, "no settings in the prompt"),
        ({"model": "../model"}, "has to be a name"),
        ({"step_cache": "table:computed=3,file=/etc/passwd"}, "no file of a step cache"),
        ({"tdtm": "table:1.1,file=/etc/passwd"}, "no file of token merging"),
    ],
)
def test_bad_tasks_are_refused(queue: JobQueue, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        queue.submit(task(**options))  # type: ignore[arg-type]
    assert queue.list() == []


def test_sources_have_to_be_there(queue: JobQueue) -> None:
    with pytest.raises(NotFoundError, match="There is no file 'file-0{26}'"):
        queue.submit(task(images=["file-" + "0" * 26]))
    job = queue.submit(task())
    with pytest.raises(ConflictError, match="is queued"):
        queue.submit(task(videos=[job.id], num_frames=34))


def test_what_never_fits_is_refused_with_what_would(queue: JobQueue) -> None:
    with pytest.raises(MemoryBudgetError, match="These would fit: num_frames 100"):
        queue.submit(task(num_frames=200))
    assert not queue.plan(task(num_frames=200)).fits


def test_a_repeat_has_the_seed_and_the_changes(queue: JobQueue) -> None:
    job = queue.submit(task(resolution="144p", steps=3))
    again = queue.repeat(job.id, {"width": 64, "height": 64, "steps": None})
    assert again.parent == job.id
    assert again.parent_kind == "repeat"
    assert again.task.options["seed"] == job.task.options["seed"]
    assert not {"resolution", "steps"} & again.task.options.keys()


def test_events_can_be_followed_and_replayed(queue: JobQueue) -> None:
    job = queue.submit(task())
    replayed = queue.subscribe(after=0, timeout=0.01)
    assert next(replayed) == {**queue.events()[0], "event": "job", "state": "queued", "id": job.id}
    assert next(replayed) is None
    queue.cancel(job.id)
    event = next(replayed)
    assert event is not None
    assert event["state"] == "cancelled"
    assert queue.last_event() == event["number"]


def test_an_edit_keeps_the_sampler_that_was_chosen(queue: JobQueue) -> None:
    video = queue.add_upload(io.BytesIO(b"video")).id
    options = {"prompt": "blue", "source_prompt": "red", "video": video}
    plain = queue.submit(Task(EDIT, options))
    assert plain.task.options["sampler"] == "midpoint"
    chosen = queue.submit(Task(EDIT, options | {"sampler": "rflow"}))
    assert queue.repeat(chosen.id).task.options["sampler"] == "rflow"
    with pytest.raises(UsageError, match="video is missing"):
        queue.plan(Task(EDIT, {"prompt": "blue", "source_prompt": "red"}))
    with pytest.raises(UsageError, match="unknown kind"):
        queue.plan(Task("delete", options))
