"""Contract of samplers in the pipeline: they work with every technique and are recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline, Video
from mlx_sora.runtime.events import Finished, StepFinished
from mlx_sora.sampling import SAMPLERS
from mlx_sora.video.writer import save_frames
from tests.helpers.resume import check_resumes

STEPS = 4
SMALL = {"prompt": "a red circle", "seed": 3, "steps": STEPS, "num_frames": 17}
SMALL |= {"width": 32, "height": 32}


def made(pipe: Pipeline, sampler: str, **options: object) -> tuple[list[np.ndarray], Video]:
    """Return the latents after each step, and the video."""
    request = GenerationRequest.from_dict({**SMALL, "sampler": sampler, **options})
    latents = []
    for event in pipe.stream(request):
        if isinstance(event, StepFinished):
            latents.append(np.array(event.latents))
        elif isinstance(event, Finished):
            return latents, event.video
    raise AssertionError("a run ends with Finished")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_agrees_streamed_and_sequential(pipe: Pipeline, sampler: str) -> None:
    plain, video = made(pipe, sampler)
    assert video.metadata["settings"]["sampler"] == sampler
    streamed, _ = made(pipe, sampler, ci_dl=True)
    for a, b in zip(plain, streamed, strict=True):
        assert np.array_equal(a, b)
    apart, _ = made(pipe, sampler, sequential_guidance=True)
    assert np.abs(apart[-1] - plain[-1]).max() < 1e-3
    assert len(made(pipe, sampler, guidance=1.0)[0]) == STEPS


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_leap_counts_the_evaluations_it_saves(pipe: Pipeline, sampler: str) -> None:
    plain, leaping = made(pipe, sampler)[0], made(pipe, sampler, lpl="fixed:2")
    for a, b in zip(plain[:2], leaping[0][:2], strict=True):
        assert np.array_equal(a, b)
    evaluations = SAMPLERS[sampler].evaluations
    assert leaping[1].metadata["accelerations"]["lpl"]["evaluations_saved"] == 2 * evaluations - 1


def test_merged_step_merges_all_its_evaluations(pipe: Pipeline) -> None:
    """The plan counts two evaluations in each merged step."""
    request = {**SMALL, "sampler": "midpoint"}
    work = [
        pipe.plan(GenerationRequest.from_dict({**request, "tdtm": tdtm})).stage("denoise").flops
        for tdtm in ("off", "1", "2")
    ]
    assert work[0] - work[1] == pytest.approx(work[1] - work[2])
    merged, video = made(pipe, "midpoint", tdtm="1")
    assert video.metadata["accelerations"]["tdtm"]["merged_steps"] == 1
    assert not np.array_equal(merged[0], made(pipe, "midpoint")[0][0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_given_frame_stays_and_conditions_the_others(
    pipe: Pipeline, sampler: str, tmp_path: Path
) -> None:
    picture = save_frames(tmp_path / "a.png", np.full((1, 32, 32, 3), 200, np.uint8), 1)
    given, plain = made(pipe, sampler, images=[str(picture)])[0], made(pipe, sampler)[0]
    for latents in given:
        assert np.array_equal(latents[:, 0], given[0][:, 0])
    assert not np.array_equal(given[-1][:, 0], plain[-1][:, 0])
    assert np.abs(given[-1][:, 1:] - plain[-1][:, 1:]).max() > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_interrupted_run_continues_exactly(pipe: Pipeline, sampler: str, tmp_path: Path) -> None:
    """Over clips that continue each other, before and after a given frame starts."""
    picture = save_frames(tmp_path / "a.png", np.full((1, 32, 32, 3), 200, np.uint8), 1)
    given = {"images": [[str(picture), 0, 0.7]], "loop": 2, "num_frames": 34, "steps": 3}
    mode = {"midpoint": "joint", "ab2": "noised"}.get(sampler, "clean")
    options = {**SMALL, "sampler": sampler, **given, "condition_edit": 0.5, "image_guidance": mode}
    (tmp_path / "out").mkdir()
    check_resumes(pipe, tmp_path / "out", options, after=(1, 2, 4), decode=True)


def test_samplers_differ(pipe: Pipeline) -> None:
    ends = [made(pipe, sampler)[0][-1] for sampler in SAMPLERS]
    assert all(np.abs(a - ends[0]).max() > 1e-3 for a in ends[1:])
