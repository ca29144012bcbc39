"""The real worker and helper, with the bundled model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mlx_sora.errors import MemoryBudgetError, UsageError
from mlx_sora.loading import preview_map
from mlx_sora.loading.model_folder import find_model
from mlx_sora.pipeline.pipeline import Pipeline
from mlx_sora.server import planning
from mlx_sora.server.checks import Sources, checked_task, command
from mlx_sora.server.helper import Helper
from mlx_sora.server.planning import plan_task
from mlx_sora.server.processes import WorkerProcess
from mlx_sora.server.queue import JobQueue, Programs
from mlx_sora.server.task import EDIT, Task
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.output_path import checkpoint_path
from mlx_sora.video.reader import read_video
from tests.helpers.queue import ended, open_queue, task, wait


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobQueue]:
    """A queue that works."""
    opened = open_queue(tmp_path_factory.mktemp("server"), programs=Programs())
    yield opened
    opened.stop()


@pytest.fixture(scope="module")
def video(queue: JobQueue) -> str:
    """The identifier of a finished video of 17 frames."""
    job = queue.submit(task("a red circle", num_frames=17, steps=3, seed=3, output="webp"))
    done = ended(queue, job)
    assert done.state == "done", done.error
    return done.id


def test_a_repeat_makes_the_same_frames(queue: JobQueue, video: str) -> None:
    again = ended(queue, queue.repeat(video))
    first, second = (read_video(queue.content(id)).frames for id in (video, again.id))
    assert first.shape == (17, 64, 64, 3)
    assert (first == second).all()


def test_a_video_is_shown_and_described(queue: JobQueue, video: str) -> None:
    assert queue.content(video, "thumbnail").read_bytes()[8:12] == b"WEBP"
    with Image.open(queue.content(video, "thumbnail")) as thumbnail:
        assert thumbnail.size == (64, 64)
    with Image.open(queue.content(video, "spritesheet")) as sheet:
        assert sheet.format == "JPEG"
        assert sheet.size == (5 * 64, 2 * 64)
    record = json.loads(queue.content(video, "record").read_text())
    assert record == read_metadata(queue.content(video))
    assert str(queue.folder) not in json.dumps(record)
    job = queue.get(video)
    assert job.peak_memory is not None
    assert job.peak_memory > 10**7
    assert not queue.files.preview(job).exists()


def test_a_cancelled_run_ends_in_the_same_frames(queue: JobQueue, video: str) -> None:
    options = {"steps": 40, "output": "webp", "num_frames": 17, "seed": 5}
    job = queue.submit(task("a blue square", **options))
    wait(lambda: queue.get(job.id).step >= 6, 60)
    queue.cancel(job.id)
    wait(lambda: queue.has_checkpoint(queue.get(job.id)))
    queue.resume(job.id)
    done, whole = (ended(queue, each) for each in (job, queue.repeat(job.id)))
    first, second = (read_video(queue.content(each.id)).frames for each in (done, whole))
    assert (first == second).all()
    assert read_metadata(queue.content(job.id))["resumed"][0]["step"] >= 4


def test_videos_are_edited_and_continued(queue: JobQueue, video: str) -> None:
    options = {"video": video, "source_prompt": "a red circle", "prompt": "a blue circle"}
    edit = queue.submit(Task(EDIT, options | {"steps": 2, "output": "webp"}), video, "edit")
    more = {"prompt": "a red circle", "videos": [video], "num_frames": 34, "steps": 2}
    extended = queue.submit(Task(options=more), video, "extend")
    done, longer = ended(queue, edit), ended(queue, extended)
    assert (done.state, longer.state) == ("done", "done"), (done.error, longer.error)
    assert (done.step, done.steps, longer.steps) == (4, 4, 2)
    sent = queue.add_upload(queue.content(done.id).open("rb"))
    assert sent.request is not None
    assert sent.request["video"] == video
    assert checked_task(Task(EDIT, sent.request)).options["source_prompt"] == "a red circle"


def test_an_upload_gives_its_request(queue: JobQueue, video: str) -> None:
    sent = queue.add_upload(queue.content(video).open("rb"), "a.webp")
    assert (sent.kind, sent.width, sent.height, sent.frames, sent.fps) == ("video", 64, 64, 17, 24)
    assert sent.request is not None
    assert (sent.request["seed"], sent.request["steps"]) == (3, 3)
    image = io.BytesIO()
    Image.new("RGB", (32, 48), "red").save(image, "PNG")
    picture = queue.add_upload(io.BytesIO(image.getvalue()), "a.png")
    assert (picture.kind, picture.width, picture.height, picture.request) == ("image", 32, 48, None)
    plan = queue.plan(task(images=[[picture.id, "last", 0.5]], num_frames=17))
    assert any("32x48" in text for text in plan.notes)
    assert str(queue.folder) not in "".join(plan.notes)
    with pytest.raises(UsageError, match="Cannot read the file: Invalid") as error:
        queue.add_upload(io.BytesIO(b"not a picture at all"))
    assert str(queue.folder) not in str(error.value)


def test_plans_and_models(queue: JobQueue) -> None:
    plan = queue.plan(task(num_frames=34, steps=5, fps=12))
    assert (plan.model, plan.width, plan.frames, plan.steps) == ("shapes", 64, 34, 5)
    assert plan.video_seconds == round(34 / 12, 3)
    assert 0 < plan.smallest <= plan.peak < plan.capacity
    assert sum(plan.shares.values()) == pytest.approx(1, abs=1e-3)
    assert (plan.fits, plan.budget, plan.suffix) == (True, None, ".mp4")
    (shapes,) = [model for model in queue.models() if model["id"] == "shapes"]
    assert shapes["defaults"]["num_frames"] == 17
    with pytest.raises(UsageError, match="png can hold one frame"):
        queue.plan(task(num_frames=17, output="png"))


def planned(options: dict[str, object]) -> planning.PlanSummary:
    """Return the plan of a generation with the bundled model."""
    return plan_task(Pipeline(find_model("shapes")), "generate", options, {}, "/tmp/plan")


def test_what_does_not_fit_comes_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"prompt": "red", "num_frames": 102, "width": 512, "height": 512, "seed": 1}
    needs = planned(large)
    assert needs.previews
    monkeypatch.setattr(planning, "machine_capacity", lambda: (needs.smallest + needs.peak) // 2)
    tight = planned(large)
    assert tight.fits
    assert tight.budget == tight.capacity
    monkeypatch.setattr(planning, "machine_capacity", lambda: needs.smallest - 1)
    numbers = preview_map.vae_numbers
    monkeypatch.setattr(preview_map, "vae_numbers", lambda model: numbers(model)[::-1])
    refused = planned(large)
    assert not refused.previews  # the map is that of another VAE
    assert not refused.fits
    assert refused.error.startswith("This needs ")
    assert refused.fix.startswith("These would fit: ")
    assert refused.suggestions
    for offer in refused.suggestions:
        assert planned(large | dict(offer)).fits, offer
    asked = planned(large | {"memory_budget": "300MB"})
    assert not asked.fits
    assert "the budget is 300 MB" in asked.error


def test_a_helper_passes_errors_on_and_comes_back() -> None:
    helper = Helper()
    with pytest.raises(UsageError, match="No such file"):
        helper.call("probe", path="/nonexistent")
    assert helper._process is not None
    helper._process.kill()
    assert all(model["fits"] for model in helper.call("models")["models"])
    helper.close()


def test_the_words_of_a_command() -> None:
    checked = checked_task(
        task(
            "a 'red' circle",
            seed=3,
            health_check=False,
            images=["file-" + "0" * 26],
            lpl="reference",
        )
    )
    sources = Sources(lambda id: Path("/folder") / id)
    words = command(checked, sources, Path("/a {b}/c.png"), steps=30, previews=True)
    assert words[:2] == ["generate", "--prompt=a 'red' circle"]
    assert {"--no-health-check", "--lpl=reference", "--checkpoint-every=3"} <= set(words)
    assert "--output=/a {{b}}/c.png" in words
    at = words.index("--image")
    assert words[at + 1 : at + 4] == ["/folder/file-" + "0" * 26, "0", "1.0"]


def test_a_task_that_does_not_fit_is_refused(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MemoryBudgetError, match="the budget is"):
        queue.submit(task(memory_budget="1MB"))


def test_a_worker_ends_with_its_server_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "a.webp"
    words = ["generate", "--model=shapes", "--prompt=red", "--seed=1", "--steps=500"]
    worker = WorkerProcess()
    worker.send([*words, "--checkpoint-every=400", f"--output={output}", "--json-events"])
    for event in worker.events():
        if event["event"] == "step_finished":
            break
    assert worker._process.stdin is not None
    worker._process.stdin.close()  # as when the server is killed
    ending = worker.wait()
    assert ending[0] == 130
    assert ending[1].startswith(f"interrupted. {checkpoint_path(output)} has the steps so far.")
    assert checkpoint_path(output).is_file()
    assert not output.exists()


def test_a_worker_without_words_ends(tmp_path: Path) -> None:
    worker = WorkerProcess()
    assert worker._process.stdin is not None
    worker._process.stdin.close()
    assert worker.wait() == (0, "")
