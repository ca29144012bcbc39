"""The Python API as people call it: names, prompts, requests, callbacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline, UsageError, Video
from mlx_sora.runtime.events import Event, Finished, StageStarted, StepFinished

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


def picture_file(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(folder / "black.png")
    return folder / "black.png"
