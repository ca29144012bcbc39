"""Uploads: bounded, read by the helper, and gone when there is no room."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.server.queue import JobQueue, Limits
from mlx_sora.server.task import ConflictError, NotFoundError
from mlx_sora.server.uploads import TooLargeError
from tests.helpers.queue import FAKES, task


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    """A queue that nothing works on, with little room."""
    opened = JobQueue(tmp_path, Limits(upload=1000, uploads=1500), FAKES)
    yield opened
    opened.stop()


def upload(queue: JobQueue, content: bytes, name: str = "") -> str:
    """Upload something and return its identifier."""
    return queue.add_upload(io.BytesIO(content), name).id


def test_an_upload_is_read_and_shown(queue: JobQueue) -> None:
    found = queue.add_upload(io.BytesIO(b"video, recorded"), "../../a.mp4")
    assert (found.kind, found.frames, found.width) == ("video", 17, 64)
    assert found.request == {"prompt": "video, recorded"}
    assert queue.get_upload(found.id) == found
    assert queue.upload_content(found.id).read_bytes() == b"video, recorded"
    assert queue.upload_content(found.id, "thumbnail").read_bytes() == b"video, recorded"
    assert [path.name for path in queue.files.uploads.iterdir()] == [found.id]
    queue.delete_upload(found.id)
    assert list(queue.files.uploads.iterdir()) == list(queue.files.pictures.iterdir()) == []
    with pytest.raises(NotFoundError):
        queue.get_upload(found.id)


def test_what_cannot_be_taken_leaves_nothing(queue: JobQueue) -> None:
    with pytest.raises(TooLargeError, match="The file has over"):
        upload(queue, b"image" * 300)
    with pytest.raises(UsageError, match="broke the reader"):
        upload(queue, b"break")
    assert list(queue.files.uploads.iterdir()) == []
    assert upload(queue, b"image").startswith("file-")  # with another helper


def test_the_oldest_that_no_job_names_make_room(queue: JobQueue) -> None:
    used, old = (upload(queue, b"image" * 150) for _ in range(2))
    job = queue.submit(task(images=[used]))
    with pytest.raises(ConflictError, match=f"{job.id} still needs {used}"):
        queue.delete_upload(used)
    upload(queue, b"image" * 150)
    with pytest.raises(NotFoundError):
        queue.get_upload(old)
    assert queue.get_upload(used).kind == "image"


def test_a_name_that_is_no_text_is_refused(queue: JobQueue) -> None:
    with pytest.raises((MlxSoraError, ValueError)):
        upload(queue, b"image", "\ud800")
