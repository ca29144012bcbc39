"""Prompts with ranges of frames: plain where there is one text, composed with everything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline, Video
from mlx_sora.errors import UsageError
from mlx_sora.pipeline.settings import latent_shares
from mlx_sora.request.edit import EditRequest
from mlx_sora.text.prompt import Segment
from mlx_sora.video.writer import save_frames

RED = "a red circle moving left on a black background"
BLUE = "a blue square moving left on a black background"
BOTH = f"[0-17] {RED} [17-34] {BLUE}"
OPTIONS = {"seed": 1, "steps": 2, "num_frames": 34}


@pytest.fixture(scope="module")
def plain(pipe: Pipeline) -> Video:
    return pipe(RED, **OPTIONS)


@pytest.fixture(scope="module")
def both(pipe: Pipeline) -> Video:
    return pipe(BOTH, **OPTIONS)


def parts(*starts: int) -> list[Segment]:
    return [Segment(start, start + 1, "", "") for start in starts]


def test_shares_are_those_of_the_frames() -> None:
    assert latent_shares(parts(0, 17), 34) == ((1.0, 0.0),) * 5 + ((0.0, 1.0),) * 5
    # Latent frames of the first chunk stand for frames 0, 1-4, 5-8, 9-12 and 13-16.
    assert latent_shares(parts(0, 7), 17) == ((1.0, 0.0),) * 2 + ((0.5, 0.5),) + ((0.0, 1.0),) * 2
    assert [sum(row) for row in latent_shares(parts(0, 3, 4, 20), 34, blend=8)] == [1.0] * 10
    assert latent_shares(parts(0, 17), 34, blend=8)[4:6] == ((0.75, 0.25), (0.4375, 0.5625))


@pytest.mark.parametrize("prompt", [f"[0-34] {RED}", f"[0-40] {RED} [40-99] {BLUE}"])
def test_one_segment_is_the_plain_video(pipe: Pipeline, plain: Video, prompt: str) -> None:
    assert np.array_equal(pipe(prompt, **OPTIONS).frames, plain.frames)


def test_each_half_follows_its_text(pipe: Pipeline, plain: Video, both: Video) -> None:
    """Two steps already tell red from blue."""

    def reddest(frames: np.ndarray) -> float:
        return float((frames[..., 0].astype(int) - frames[..., 2]).mean())

    assert reddest(both.frames[:17]) > reddest(both.frames[17:])
    assert not np.array_equal(both.frames[17:], plain.frames[17:])
    assert both.metadata["settings"]["text"] == BOTH


@pytest.mark.parametrize(
    "options",
    [
        {"sequential_guidance": True},
        {"ci_dl": True},
        {"memory_budget": "400MB"},
        {"step_cache": "every:1"},
    ],
    ids=str,
)
def test_exact_ways_give_the_same_video(
    pipe: Pipeline, both: Video, options: dict[str, object]
) -> None:
    found = pipe(BOTH, **OPTIONS, **options).frames
    assert np.abs(found.astype(int) - both.frames.astype(int)).max() <= 1


def test_it_composes(pipe: Pipeline, both: Video) -> None:
    options = {"negative_prompt": "a green triangle", "tdtm": "1", "lpl": "fixed:1"}
    assert not np.array_equal(pipe(BOTH, **OPTIONS, **options).frames, both.frames)


def test_scenes_may_have_segments(pipe: Pipeline) -> None:
    run = pipe.prepare(GenerationRequest(prompt=f"|0|{BOTH}|1|{BLUE}", loop=2, **OPTIONS))
    assert [*run.encodings] == [RED, BLUE]
    assert run.settings.texts == (BOTH, BLUE)
    one, two = (len(run.encodings[text].ids) for text in (RED, BLUE))
    assert run.workload.text_tokens == one + two
    negative = pipe.prepare(
        GenerationRequest(prompt=BOTH, negative_prompt=f"{RED} {RED}", **OPTIONS)
    )
    longest = len(negative.encodings[f"{RED} {RED}"].ids)
    assert negative.workload.text_tokens == 2 * longest


def test_windows_have_scenes_instead(pipe: Pipeline) -> None:
    options = {"prompt": BOTH, "long": "windows", **OPTIONS}
    with pytest.raises(UsageError, match="takes no ranges of frames"):
        pipe.prepare(GenerationRequest(loop=2, **options))
    assert pipe.prepare(GenerationRequest(**options)).settings.segments


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (f"[0-17] {RED} [17-51] {BLUE}", "describes 51 frames, but a clip has 34"),
        (f"[0-9] {RED} [9-17] {BLUE}", r"\[9-17\] of the prompt goes on to frame 34"),
        (f"[0-17] {RED} [17-34] a dog", "not trained for .*17-34.* of the prompt"),
        (f"[0-17] {RED} [17-34] ☃", r"no character of \[17-34\] of the prompt|Nothing is left"),
    ],
)
def test_warnings(pipe: Pipeline, prompt: str, said: str) -> None:
    run = pipe.prepare(GenerationRequest(prompt=prompt, **OPTIONS))
    assert len(run.result.warnings) == 1
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(run.result.warnings[0])


def test_an_edit_changes_by_frames_but_its_source_does_not(
    pipe: Pipeline, plain: Video, tmp_path: Path
) -> None:
    video = str(save_frames(tmp_path / "video.mp4", plain.frames, 24, overwrite=True))
    target = GenerationRequest(prompt=BOTH, steps=2)
    edit = EditRequest(target=target, video=video, source_prompt=RED)
    assert [*pipe.prepare_edit(edit).encodings] == [RED, BLUE]
    with pytest.raises(UsageError, match="source prompt has no ranges"):
        pipe.prepare_edit(replace(edit, source_prompt=BOTH))
