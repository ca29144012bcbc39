"""Long videos as windows: one is a plain clip, several compose with everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_sora import GenerationRequest, Pipeline, Video
from mlx_sora.errors import UsageError
from mlx_sora.runtime.events import (
    Event,
    Finished,
    Noted,
    PreviewReady,
    RunPlanned,
    StepFinished,
)
from tests.helpers.resume import check_resumes

SMALL = {"prompt": "a red circle", "seed": 3, "steps": 3, "width": 32, "height": 32}
LONG = {**SMALL, "num_frames": 34, "loop": 3, "long": "windows"}
SCENES = {**LONG, "prompt": "|0|a red circle|2|a blue square"}


def events(pipe: Pipeline, options: dict[str, Any]) -> list[Event]:
    return list(pipe.stream(GenerationRequest.from_dict(options)))


def latents(seen: list[Event]) -> np.ndarray:
    """Latents after each step, [N, T, H, W, C]."""
    steps = (each.latents for each in seen if isinstance(each, StepFinished))
    return np.concatenate([np.array(z) for z in steps])


def video(seen: list[Event]) -> Video:
    last = seen[-1]
    assert isinstance(last, Finished)
    return last.video


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("media") / "a.png"
    Image.new("RGB", (32, 32), "blue").save(path)
    return str(path)


@pytest.fixture(scope="module")
def plain(pipe: Pipeline) -> list[Event]:
    return events(pipe, SCENES)


def test_one_window_is_a_plain_clip(pipe: Pipeline, picture: str) -> None:
    """Bit for bit, with a picture that starts later and every kind of technique."""
    options = {**SMALL, "num_frames": 34, "images": [[picture, 20, 0.7]], "tdtm": "1"}
    options |= {"step_cache": "every:2,warmup=1", "guidance_cache": "every:2,after=0"}
    options |= {"sampler": "midpoint", "image_guidance": "joint"}
    clip, window = (events(pipe, {**options, "long": long}) for long in ("clips", "windows"))
    assert np.array_equal(latents(clip), latents(window))
    records = [video(seen).metadata["accelerations"] for seen in (clip, window)]
    for record in records:
        record.pop("ci_dl", None)  # which has seconds
    assert records[0] == records[1]


def test_windows_make_one_video_of_all_frames(pipe: Pipeline, plain: list[Event]) -> None:
    made = video(plain)
    assert made.frames is not None
    assert (made.num_frames, made.frames.shape) == (68, (68, 32, 32, 3))
    assert latents(plain).shape == (3, 20, 4, 4, 4)
    planned = next(each for each in plain if isinstance(each, RunPlanned))
    assert [stage.stage for stage in planned.stages] == ["encode", "denoise", "decode"]
    notes = [each.message for each in plain if isinstance(each, Noted)]
    work = "3 windows of 10 latent frames, one every 5: 1.50 times the work of the 20 frames alone"
    assert f"{work}." in notes
    assert pipe.prepare(GenerationRequest.from_dict(SCENES)).written.endswith(f", in {work}")
    assert made.metadata["settings"]["scenes"] == ["a red circle", "a red circle", "a blue square"]


def test_streamed_blocks_and_sequential_guidance_change_nothing(
    pipe: Pipeline, plain: list[Event]
) -> None:
    streamed = events(pipe, {**SCENES, "ci_dl": True})
    assert np.array_equal(latents(streamed), latents(plain))
    depth = pipe.model.config("transformer")["depth"]
    assert video(streamed).metadata["accelerations"]["ci_dl"]["denoise"]["loads"] == 3 * 3 * depth
    sequential = events(pipe, {**SCENES, "sequential_guidance": True})
    assert np.allclose(latents(sequential), latents(plain), rtol=0, atol=1e-4)


def test_scenes_blend_over_the_frames_asked_for(pipe: Pipeline, plain: list[Event]) -> None:
    """The first step differs only where the scenes blend, or where one window ends before a cut."""
    cut = events(pipe, {**SCENES, "scene_blend": 0})
    same = (latents(cut)[0] == latents(plain)[0]).all(axis=(1, 2, 3))
    assert same.tolist() == [True] * 10 + [False] * 5 + [True] * 5


def test_given_frames_lie_anywhere(pipe: Pipeline, picture: str) -> None:
    """Frame 60 is in the last window only; its latent frame stays as it was encoded."""
    z = latents(events(pipe, {**LONG, "images": [[picture, 60]]}))
    kept = [bool((z[0, i] == z[-1, i]).all()) for i in range(z.shape[1])]
    assert kept == [i == 18 for i in range(20)]


def test_previews_show_the_whole_video(pipe: Pipeline) -> None:
    seen = events(pipe, {**LONG, "preview_every": 3})
    shown = [each.frames.shape for each in seen if isinstance(each, PreviewReady)]
    assert shown == [(20, 32, 32, 3)]


def test_each_window_has_its_techniques_and_one_leap_ends_all(
    pipe: Pipeline, tmp_path: Path, picture: str
) -> None:
    """Interrupted after any step, a run goes on with the state of every window."""
    options = {**SCENES, "steps": 7, "lpl": "adaptive:patience=2,tolerance=2", "sampler": "ab2"}
    options |= {"step_cache": "online:warmup=2,threshold=9", "guidance_cache": "every:2,after=0"}
    options |= {"tdtm": "1", "images": [[picture, 60, 0.3]]}
    whole = check_resumes(pipe, tmp_path, options, after=(1, 3), decode=True)
    done = whole.record["accelerations"]
    assert done["lpl"]["leapt"]
    assert len(whole.latents) == done["lpl"]["after_steps"] + 1 < 7
    assert [len(done[name]) for name in ("step_cache", "guidance_cache", "tdtm")] == [3, 3, 3]
    evaluations = [window["evaluations"] for window in done["step_cache"]]
    assert evaluations == [len(whole.latents)] * 3
    # When the picture begins to move, the last window needs both predictions.
    assert [window["halves_saved"] for window in done["guidance_cache"]] == [3, 3, 2]


def test_unused_options_are_named(pipe: Pipeline) -> None:
    def warnings(**options: object) -> str:
        request = GenerationRequest.from_dict({**LONG, **options})
        return " ".join(pipe.prepare(request).result.warnings)

    assert "--scene-blend has no effect" in warnings(scene_blend=5)
    assert "--scene-blend has no effect" in warnings(scene_blend=5, long="clips")
    assert "--condition-edit has no effect" in warnings(condition_edit=0.5)
    assert "no effect" not in warnings(prompt=SCENES["prompt"], scene_blend=5)
    with pytest.raises(UsageError, match="18 is more than windows share"):
        warnings(scene_blend=18)
