"""The Python API as people call it: names, prompts, requests, callbacks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_sora import GenerationRequest, Pipeline, UsageError, Video
from mlx_sora.runtime.events import Event, Finished, StageStarted, StepFinished
from mlx_sora.video.writer import save_frames

PROMPT = "a red circle moving right on a black background"

#: The smallest picture.
SMALL = {"seed": 1, "steps": 2, "num_frames": 1}


@pytest.fixture(scope="module")
def picture(pipe: Pipeline) -> Video:
    return pipe(PROMPT, **SMALL)


def test_a_model_is_opened_by_its_name(pipe: Pipeline) -> None:
    named = Pipeline("shapes", dtype="float32")
    assert named.model.path == pipe.model.path
    assert repr(named) == "Pipeline('shapes', dtype='float32')"
    assert Pipeline(model=named.model.path).model.path == pipe.model.path


def test_a_prompt_streams_and_a_request_is_called(pipe: Pipeline, picture: Video) -> None:
    *_, last = pipe.stream(PROMPT, **SMALL)
    assert isinstance(last, Finished)
    called = pipe(GenerationRequest.from_dict({"prompt": PROMPT, **SMALL}))
    assert np.array_equal(last.video.frames, picture.frames)
    assert np.array_equal(called.frames, picture.frames)
    assert pipe.plan(PROMPT, **SMALL) == pipe.plan(called.request)
    with pytest.raises(UsageError, match="steps is not part of it. Put steps into the request"):
        pipe.stream(called.request, steps=3)


def test_a_callback_gets_the_events(pipe: Pipeline, picture: Video) -> None:
    seen: list[Event] = []
    made = pipe(PROMPT, callback=seen.append, **SMALL)
    assert np.array_equal(made.frames, picture.frames)
    assert [e.step for e in seen if isinstance(e, StepFinished)] == [0, 1]
    assert isinstance(seen[-1], Finished)


def test_a_bar_shows_progress_if_asked(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(PROMPT, **SMALL)
    assert "%" not in capsys.readouterr().err
    pipe(PROMPT, progress=True, **SMALL)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(r"decode *\|█+\|100%", shown.err)
    assert shown.err.endswith("\n")


def test_warnings_are_logged_in_keywords(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    made = pipe(PROMPT, guidance=1, negative_prompt="blue", **SMALL)
    assert "--negative-prompt has no effect without guidance." in made.warnings
    assert "negative_prompt has no effect without guidance." in caplog.messages


@pytest.mark.parametrize("kind", [StepFinished, Finished])
def test_what_a_callback_raises_ends_the_run(
    pipe: Pipeline, tmp_path: Path, kind: type[Event]
) -> None:
    """The next run begins at once, and there is no file but that of a run that was done."""

    def stop(event: Event) -> None:
        if isinstance(event, kind):
            raise RuntimeError("enough")

    output = tmp_path / "a.png"
    with pytest.raises(RuntimeError, match="enough"):
        pipe(PROMPT, callback=stop, output=output, **SMALL)
    assert list(tmp_path.iterdir()) == ([output] if kind is Finished else [])
    seen: list[Event] = []
    edited = pipe.edit(
        picture_file(tmp_path),
        source_prompt=PROMPT,
        prompt=PROMPT,
        steps=1,
        callback=seen.append,
    )
    assert edited.num_frames == 1
    assert any(isinstance(event, StageStarted) for event in seen)


def clip(value: int, frames: int = 17) -> np.ndarray:
    """A square of some grey that moves."""
    found = np.zeros((frames, 64, 64, 3), np.uint8)
    for index, frame in enumerate(found):
        frame[20:40, index : index + 20] = value
    return found


def test_pixels_do_what_their_file_does(pipe: Pipeline, tmp_path: Path) -> None:
    frames, options = clip(200), {"seed": 1, "steps": 1, "num_frames": 17}
    save_frames(tmp_path / "first.png", frames[:1], 24)
    file = pipe(PROMPT, images=tmp_path / "first.png", **options)
    pixels = pipe(PROMPT, images=[(Image.fromarray(frames[0]), "first")], **options)
    assert np.array_equal(pixels.frames, file.frames)
    (entry,), (expected,) = (v.metadata["settings"]["media"] for v in (pixels, file))
    assert entry["path"].startswith("memory:")
    assert (entry["size"], entry["num_frames"]) == (expected["size"], 1)
    assert pixels.metadata["request"]["images"] == [[entry["path"], 0, 1.0]]
    continued = pipe(PROMPT, videos=frames, **options | {"num_frames": 34})
    assert continued.warnings == (), "pixels have no rate that could differ"
    assert np.corrcoef(continued.frames[:17].ravel(), frames.ravel())[0, 1] > 0.8
    decoded = pipe.reconstruct(frames)
    assert np.corrcoef(decoded.frames.ravel(), frames.ravel())[0, 1] > 0.8
    edited = pipe.edit(continued, source_prompt=PROMPT, prompt=PROMPT, steps=1)
    assert edited.num_frames == 34
    assert edited.metadata["edit"]["video"].startswith("memory:")


def test_a_run_from_pixels_goes_on_with_the_same_pixels_only(
    pipe: Pipeline, tmp_path: Path
) -> None:
    output = tmp_path / "a.mp4"
    options = {"seed": 1, "steps": 3, "num_frames": 17, "output": output, "checkpoint_every": 1}

    def stop(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == 1:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        pipe(PROMPT, images=clip(200)[0], callback=stop, **options)
    (checkpoint,) = tmp_path.iterdir()
    with pytest.raises(UsageError, match="belongs to another run"):
        pipe(PROMPT, images=clip(201)[0], **options)
    with pytest.raises(UsageError, match="stands for pixels in memory"):
        pipe.resume(checkpoint)
    with pytest.raises(UsageError, match="belongs to another run"):
        pipe.resume(checkpoint, images=clip(201)[0])
    with pytest.raises(UsageError, match="cannot be changed"):
        pipe.resume(checkpoint, steps=4)
    seen: list[Event] = []
    resumed = pipe.resume(checkpoint, images=clip(200)[0], callback=seen.append)
    assert [event.step for event in seen if isinstance(event, StepFinished)] == [2]
    assert resumed.path == output


def picture_file(folder: Path) -> Path:
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    return folder / "black.png"
