"""The video API, through OpenAI's own client."""

from __future__ import annotations

import base64
import json
import threading
import time
from typing import Any

import openai
import pytest
from openai import OpenAI

from mlx_sora.server.store import JobError
from tests.helpers.fake_queue import FakeQueue

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PROMPT = "a red circle"

#: The client's own check takes nothing but files for a video: a reference goes in `extra_body`.
omit: Any = openai.omit


def options(queue: FakeQueue, id: str) -> dict[str, Any]:
    """The options of a job but for its prompt and seed."""
    found = dict(queue.get(id).task.options)
    return {name: value for name, value in found.items() if name not in ("prompt", "seed")}


def test_a_video_from_text(client: OpenAI, queue: FakeQueue) -> None:
    video = client.videos.create(prompt=PROMPT)
    assert (video.object, video.status, video.progress) == ("video", "queued", 0)
    assert (video.prompt, video.model, video.size, video.seconds) == (
        *(PROMPT, "shapes"),
        *("64x64", "0.71"),
    )
    assert video.error is video.completed_at is video.remixed_from_video_id is None
    assert options(queue, video.id) == {}


def test_seconds_and_size_are_what_the_engine_takes(client: OpenAI, queue: FakeQueue) -> None:
    video = client.videos.create(
        prompt=PROMPT, model="shapes", seconds="2", size="128x96", extra_body={"steps": 12}
    )
    assert options(queue, video.id) == {
        "model": "shapes",
        "num_frames": 51,
        "width": 128,
        "height": 96,
        "steps": 12,
    }
    assert (video.size, video.seconds) == ("128x96", "2.12")


@pytest.mark.parametrize(
    ("seconds", "more", "frames"),
    [
        ("4", {}, 102),
        ("1", {}, 24),
        (2.5, {}, 60),
        ("2", {"fps": 12}, 24),
        ("0.01", {}, 1),
    ],
)
def test_a_length_in_seconds(
    seconds: Any, more: dict[str, Any], frames: int, client: OpenAI, queue: FakeQueue
) -> None:
    video = client.videos.create(prompt=PROMPT, seconds=seconds, extra_body=more)
    assert options(queue, video.id)["num_frames"] == frames


def test_a_size_by_its_name(client: OpenAI, queue: FakeQueue) -> None:
    video = client.videos.create(prompt=PROMPT, size="240p", extra_body={"aspect_ratio": "1:1"})
    assert options(queue, video.id) == {"resolution": "240p", "aspect_ratio": "1:1"}


def test_options_of_every_type_go_along(client: OpenAI, queue: FakeQueue) -> None:
    """The client sends a form, in which everything is text."""
    more = {
        "seed": 7,
        "guidance": 1.5,
        "ci_dl": True,
        "health_check": False,
        "sampler": "midpoint",
        "tdtm": 3,
        "lpl": "off",
        "output": "webp",
        "num_frames": "4s",
    }
    video = client.videos.create(prompt=PROMPT, extra_body=more)
    found = dict(queue.get(video.id).task.options)
    assert found == {**more, "prompt": PROMPT, "tdtm": "3"}


def test_a_picture_as_a_file(client: OpenAI, queue: FakeQueue) -> None:
    video = client.videos.create(prompt=PROMPT, input_reference=("a.png", b"picture 1"))
    [[id, frame, strength]] = options(queue, video.id)["images"]
    assert (queue.received, frame, strength) == ([b"picture 1"], 0, 1.0)
    assert queue.get_upload(id).name == "a.png"


def test_a_picture_as_a_data_url(client: OpenAI, queue: FakeQueue) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"picture 2").decode()
    client.videos.create(prompt=PROMPT, extra_body={"input_reference": {"image_url": url}})
    assert queue.received == [b"picture 2"]


def test_a_picture_that_was_uploaded_before(client: OpenAI, queue: FakeQueue) -> None:
    file = client.files.create(file=("b.png", b"picture 3"), purpose="vision")
    reference = {"input_reference": {"file_id": file.id}}
    by_id = client.videos.create(prompt=PROMPT, extra_body=reference)
    assert options(queue, by_id.id)["images"] == [[file.id, 0, 1.0]]
    in_a_list = client.videos.create(prompt=PROMPT, extra_body={"images": [file.id]})
    assert options(queue, in_a_list.id)["images"] == [[file.id, 0, 1.0]]
    nested = client.videos.create(prompt=PROMPT, extra_body={"images": [[file.id, "last", 0.5]]})
    assert options(queue, nested.id)["images"] == [[file.id, -1, 0.5]]
    text = json.dumps([[file.id], [file.id, "last"]])
    as_json = client.videos.create(prompt=PROMPT, extra_body={"images": text})
    assert options(queue, as_json.id)["images"] == [[file.id, 0, 1.0], [file.id, -1, 1.0]]


def test_a_picture_elsewhere_is_not_fetched(client: OpenAI) -> None:
    reference = {"image_url": "http://169.254.169.254/a.png"}
    with pytest.raises(openai.BadRequestError, match="The server fetches nothing"):
        client.videos.create(prompt=PROMPT, extra_body={"input_reference": reference})


def test_progress_until_it_is_completed(client: OpenAI, queue: FakeQueue) -> None:
    id = client.videos.create(prompt=PROMPT).id
    queue.change(id, state="running", progress=0.337, stage="denoise", step=10, seconds_left=3.5)
    video = client.videos.retrieve(id)
    assert (video.status, video.progress) == ("in_progress", 33)
    assert video.model_extra is not None
    own = video.model_extra["mlx_sora"]
    assert (own["stage"], own["step"], own["steps"], own["seconds_left"]) == (
        "denoise",
        10,
        30,
        3.5,
    )
    queue.change(id, progress=0.999)
    assert client.videos.retrieve(id).progress == 99
    queue.finish(id)
    video = client.videos.retrieve(id)
    assert (video.status, video.progress, video.completed_at) == ("completed", 100, 2000)


def test_create_and_poll_asks_as_often_as_the_server_says(client: OpenAI, queue: FakeQueue) -> None:
    def work() -> None:
        while not queue.list():
            time.sleep(0.01)
        time.sleep(0.2)
        queue.finish(queue.list()[0].id)

    worker, start = threading.Thread(target=work), time.monotonic()
    worker.start()
    video = client.videos.create_and_poll(prompt=PROMPT, timeout=20)
    worker.join()
    assert video.status == "completed"
    assert time.monotonic() - start < 5  # the client alone would ask after a second, or five


def test_a_failed_video_says_why(client: OpenAI, queue: FakeQueue) -> None:
    id = client.videos.create(prompt=PROMPT).id
    queue.fail(id, JobError("NaN in step 3.", "Use float32.", 1))
    video = client.videos.retrieve(id)
    assert video.status == "failed"
    assert video.error is not None
    assert (video.error.code, video.error.message) == ("run_failed", "NaN in step 3. Use float32.")


def test_a_list_comes_in_pages(client: OpenAI) -> None:
    ids = [client.videos.create(prompt=PROMPT).id for _ in range(5)]
    page = client.videos.list(limit=2)
    assert [video.id for video in page.data] == ids[:2:-1]
    assert (page.has_more, page.last_id) == (True, ids[3])
    assert [video.id for video in page] == ids[::-1]  # the client fetches the other pages
    assert [video.id for video in client.videos.list(order="asc", after=ids[2])] == ids[3:]
    assert client.videos.list(limit=5).has_more is False


def test_an_empty_list(client: OpenAI) -> None:
    assert list(client.videos.list()) == []


def test_delete(client: OpenAI) -> None:
    id = client.videos.create(prompt=PROMPT).id
    deleted = client.videos.delete(id)
    assert (deleted.id, deleted.deleted, deleted.object) == (id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError, match=f"There is no video '{id}'"):
        client.videos.retrieve(id)
    assert list(client.videos.list()) == []


@pytest.mark.parametrize("variant", ["video", "thumbnail", "spritesheet"])
def test_download(variant: Any, client: OpenAI, queue: FakeQueue) -> None:
    id = client.videos.create(prompt=PROMPT).id
    with pytest.raises(openai.ConflictError, match="yet"):
        client.videos.download_content(id, variant=variant)
    queue.finish(id)
    assert client.videos.download_content(id, variant=variant).read() == variant.encode() * 100
    assert client.videos.download_content(id).read().startswith(b"video")


def test_remix(client: OpenAI, queue: FakeQueue) -> None:
    source = client.videos.create(prompt=PROMPT, size="128x96", extra_body={"model": "shapes"})
    with pytest.raises(openai.ConflictError, match="not finished"):
        client.videos.remix(source.id, prompt="a blue circle")
    queue.finish(source.id)
    remix = client.videos.remix(source.id, prompt="a blue circle", extra_body={"inject_steps": 3})
    assert remix.remixed_from_video_id == source.id
    job = queue.get(remix.id)
    assert (job.task.kind, job.parent, job.parent_kind) == ("edit", source.id, "remix")
    assert job.task.prompt == "a blue circle"
    assert options(queue, remix.id) == {
        "video": source.id,
        "source_prompt": PROMPT,
        "inject_steps": 3,
        "sampler": "midpoint",
        "model": "shapes",
        "width": 128,
        "height": 96,
    }


def test_edit(client: OpenAI, queue: FakeQueue) -> None:
    source = client.videos.create(prompt=PROMPT)
    queue.finish(source.id)
    more = {"video": {"id": source.id}, "source_prompt": "a circle"}
    edit = client.videos.edit(prompt="a blue circle", video=omit, extra_body=more)
    job = queue.get(edit.id)
    assert (job.task.kind, job.parent, job.parent_kind) == ("edit", source.id, "edit")
    assert job.task.options["source_prompt"] == "a circle"
    assert edit.remixed_from_video_id is None


def test_edit_of_a_file(client: OpenAI, queue: FakeQueue) -> None:
    edit = client.videos.edit(prompt="a blue circle", video=("a.mp4", b"video with record"))
    job = queue.get(edit.id)
    assert (job.task.options["source_prompt"], job.parent) == ("a red circle", None)
    with pytest.raises(openai.BadRequestError, match="No prompt is recorded") as caught:
        client.videos.edit(prompt="a blue circle", video=("a.mp4", b"video of others"))
    assert caught.value.param == "source_prompt"


@pytest.mark.parametrize(
    ("seconds", "more", "frames"),
    [("2", {}, 68), ("1", {}, 41), (None, {}, 51 + 17), (None, {"num_frames": 34}, 34)],
)
def test_extend(
    seconds: Any, more: dict[str, Any], frames: int, client: OpenAI, queue: FakeQueue
) -> None:
    source = client.videos.create(prompt=PROMPT, seconds="2", size="128x96")
    queue.finish(source.id)
    more = {**more, "video": {"id": source.id}}
    seconds = omit if seconds is None else seconds
    longer = client.videos.extend(prompt="on", seconds=seconds, video=omit, extra_body=more)
    job = queue.get(longer.id)
    assert (job.task.kind, job.parent, job.parent_kind) == ("generate", source.id, "extend")
    assert options(queue, longer.id) == {
        "videos": [[source.id, "before", 17, 1.0]],
        "num_frames": frames,
        "width": 128,
        "height": 96,
    }


def test_extend_a_file(client: OpenAI, queue: FakeQueue) -> None:
    longer = client.videos.extend(prompt="on", seconds="2", video=("a.mp4", b"video"))
    [[id, *_]] = options(queue, longer.id)["videos"]
    assert queue.get_upload(id).kind == "video"


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"prompt": " "}, "The prompt is empty.", "prompt"),
        ({"size": "wide"}, "Unknown size 'wide'. Give WIDTHxHEIGHT or 144p", "size"),
        ({"size": "1x1"}, "Width 1 is impossible.", None),
        ({"seconds": "long"}, "seconds must be a number, not 'long'.", "seconds"),
        ({"seconds": "-1"}, "-1 seconds are impossible.", "seconds"),
        ({"seconds": "0.5"}, "Cannot make 12 frames", None),
        (
            {"extra_body": {"stesp": 3}},
            "There is no option 'stesp' here. Did you mean steps?",
            "stesp",
        ),
        ({"extra_body": {"overwrite": True}}, "There is no option 'overwrite' here.", "overwrite"),
        ({"extra_body": {"steps": "many"}}, "--steps must be a whole number, not 'many'.", "steps"),
        ({"extra_body": {"steps": 100_000}}, "--steps 100000 is out of range.", "steps"),
        ({"extra_body": {"sampler": "x"}}, "unknown --sampler 'x'. Valid: rflow", "sampler"),
        ({"extra_body": {"ci_dl": "yes"}}, "--ci-dl must be true or false, not 'yes'.", "ci_dl"),
        ({"extra_body": {"kind": "draw"}}, "There is no kind 'draw'.", "kind"),
        ({"extra_body": {"output": "/etc/x.mp4"}}, "Unknown output '/etc/x.mp4'.", "output"),
        ({"extra_body": {"images": "/etc/passwd"}}, "'/etc/passwd' is no upload", "images"),
        ({"extra_body": {"images": "[[1]]"}}, "'1' is no upload", "images"),
        ({"extra_body": {"images": "[[["}}, "images is no list of ids.", "images"),
        ({"model": "/etc"}, "The model has to be a name.", None),
        ({"input_reference": ("a.txt", b"text")}, "a.txt is no picture", None),
        ({"seconds": "60"}, "Too long. Try 17.", None),
    ],
)
def test_what_is_wrong_is_a_line(
    options: dict[str, Any], message: str, param: str | None, client: OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(**({"prompt": PROMPT} | options))
    body: Any = caught.value.body
    assert message in body["message"]
    assert (body["param"], body["type"]) == (param, "invalid_request_error")
    assert "\n" not in body["message"]


def test_a_video_that_does_not_fit_has_a_code_of_its_own(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt=PROMPT, seconds="60")
    assert caught.value.code == "does_not_fit"


def test_a_full_queue(client: OpenAI, queue: FakeQueue) -> None:
    queue.length = 1
    client.videos.create(prompt=PROMPT)
    patient = client.with_options(max_retries=5)
    start = time.monotonic()
    with pytest.raises(openai.RateLimitError, match="The queue is full"):
        patient.videos.create(prompt=PROMPT)
    assert time.monotonic() - start < 2  # without trying again, which takes the client longer


def test_models(client: OpenAI) -> None:
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("shapes", "model", "mlx_sora")
    assert model.model_extra is not None
    assert model.model_extra["mlx_sora"]["defaults"] == {"width": 64}
