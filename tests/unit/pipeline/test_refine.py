"""Two passes: what passes between them, the steps that are left, and what composes with that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline, UsageError, Video
from mlx_sora.cli.plans import estimate_lines, estimate_record
from mlx_sora.conditioning.latents import ConditioningLatents
from mlx_sora.errors import MemoryBudgetError
from mlx_sora.geometry import Size, refined_size
from mlx_sora.loading.networks import load_vae
from mlx_sora.memory.profiles import parse_bytes
from mlx_sora.pipeline import refine
from mlx_sora.pipeline.settings import resolve
from mlx_sora.runtime.events import (
    Event,
    Finished,
    PreviewReady,
    StageStarted,
    StepFinished,
    Warned,
)
from mlx_sora.runtime.progress import RunProgress
from mlx_sora.sampling.noise import Noise
from mlx_sora.server import planning
from mlx_sora.server.planning import plan_task
from mlx_sora.video.frames import to_uint8
from mlx_sora.video.metadata import replay_options
from mlx_sora.video.reader import resize_and_crop
from tests.helpers.resume import check_resumes
from tests.helpers.speeds import SPEEDS

OPTIONS = {"prompt": "a red circle moving right on a black background", "seed": 3, "steps": 4}
OPTIONS |= {"width": 32, "height": 32, "num_frames": 17}
SIZE, LARGE = Size(48, 40), {"width": 48, "height": 40}
REFINED = OPTIONS | {"refine": str(SIZE)}


def events(pipe: Pipeline, **more: Any) -> list[Event]:
    return list(pipe.stream(GenerationRequest.from_dict({**REFINED, **more})))


def video(seen: Sequence[Event]) -> Video:
    assert isinstance(seen[-1], Finished)
    return seen[-1].video


def steps(seen: Sequence[Event]) -> list[StepFinished]:
    return [event for event in seen if isinstance(event, StepFinished)]


def reencoded(pipe: Pipeline, frames: np.ndarray) -> tuple[mx.array, np.ndarray]:
    """Return latents of the resized frames, and their decoding, from the VAE by hand."""
    vae = load_vae(pipe.model, ("encoder", "decoder"))
    large = resize_and_crop(frames, SIZE)
    chunks = (mx.array(large[i : i + 17]) for i in range(0, len(large), 17))
    pixels = [chunk.astype(mx.float32) / 127.5 - 1 for chunk in chunks]
    latents = mx.concatenate(list(vae.encode_chunks(pixels)), axis=1)
    return latents, np.concatenate([*map(to_uint8, vae.decode_chunks(latents, len(frames)))])


def test_strength_0_enlarges_chunk_by_chunk(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = {"num_frames": 40, "steps": 2}  # two whole chunks and a part of one
    small = pipe(**OPTIONS | length).frames
    monkeypatch.setattr(refine, "PART_BYTES", 1)
    seen = events(pipe, refine_strength=0, **length)
    stages = [event.stage for event in seen if isinstance(event, StageStarted)]
    assert stages == ["encode", "denoise", *["decode", "read"] * 3, "decode"]
    assert np.array_equal(video(seen).frames, reencoded(pipe, small)[1])
    assert video(seen).metadata["settings"]["refine_steps"] == 0


def test_strength_1_is_a_video_of_that_size(pipe: Pipeline) -> None:
    picture = np.full((20, 20, 3), (200, 30, 30), np.uint8)
    more = {"images": [(picture, "last", 0.8)], "tdtm": "last:2", "step_cache": "every:2,warmup=1"}
    more |= {"loop": 2, "num_frames": 34, "steps": 2, "guidance": 1}
    plain = pipe(**OPTIONS | more | LARGE)
    assert np.array_equal(pipe(**REFINED | more, refine_strength=1).frames, plain.frames)


def test_the_second_pass_begins_in_the_schedule_of_its_size(pipe: Pipeline) -> None:
    small = pipe(**OPTIONS).frames
    seen = events(pipe, refine_strength=0.3)
    first, second = steps(seen)[:4], steps(seen)[4:]
    plain = steps(list(pipe.stream(GenerationRequest.from_dict(OPTIONS | LARGE))))
    assert [event.t for event in first] != [event.t for event in plain]
    assert second[0].t == pytest.approx(300)
    later = [event.t for event in plain if event.t < 300]
    assert [event.t for event in second[1:]] == later
    assert [(event.step, event.total) for event in second] == [
        (i, len(later) + 1) for i in range(len(later) + 1)
    ]
    assert np.array_equal(video(events(pipe, refine_strength=0.3)).frames, video(seen).frames)
    # Little noise changes little, more of it more.
    _, enlarged = reencoded(pipe, small)
    near, far = (
        np.abs(made.frames.astype(float) - enlarged).mean()
        for made in (video(seen), video(events(pipe, refine_strength=0.9)))
    )
    assert 0 < near < far


def test_given_frames_stay_at_the_larger_size(pipe: Pipeline) -> None:
    """One is there from the start; another may change from t = 200 on; a third begins noised."""
    picture = np.zeros((8, 8, 3), np.uint8)
    images = [(picture, 0, 1.0), (picture, 4, 0.8), (picture, 8, 0.2)]
    request = GenerationRequest.from_dict(OPTIONS | {"images": images})
    settings = resolve(request, pipe.model)
    shape = (*settings.geometry.latent, 4)
    given = ConditioningLatents(settings.media, settings.geometry.latent, 4)
    noise, first = Noise([3], shape), mx.ones((1, *shape))
    z, conditioning = given.initial_latents(0, noise, first, 0.6)
    assert conditioning is not None
    mask = conditioning.mask[0].tolist()
    fixed, later, begun = settings.media.media_clips
    assert [mask[item.latents[0]] for item in (fixed, later, begun)] == [0, pytest.approx(0.2), 1]
    half = 0.4 * mx.ones(shape) + 0.6 * noise.initial()[0]
    other = next(i for i in range(shape[0]) if settings.media.mask(0)[i] == 1)
    assert mx.allclose(z[0, other], half[other], atol=1e-6)
    for item in (fixed, later):  # whose latents are still those of zeros
        assert mx.array_equal(z[0, item.latents[0]], mx.zeros(shape[1:]))
    index = begun.latents[0]
    assert mx.allclose(z[0, index], 0.6 * noise.initial()[0, index], atol=1e-6)


def test_techniques_act_in_both_passes_and_lpl_by_time(pipe: Pipeline) -> None:
    more = {"tdtm": "last:2", "step_cache": "every:2,warmup=1", "refine_strength": 0.1}
    record = video(events(pipe, lpl="fixed:2", **more)).metadata
    assert record["accelerations"]["lpl"]["after_steps"] == 2
    assert record["second_pass"].keys() == {"tdtm", "step_cache"}
    made = record["settings"]["refine_steps"]
    assert 0 < made < OPTIONS["steps"]
    assert record["second_pass"]["tdtm"]["merged_steps"] == min(made, 2)
    first = OPTIONS["steps"] - made
    assert record["second_pass"]["step_cache"]["computed"][0] == first

    seen = events(pipe, lpl="t:200", refine_strength=0.9)
    record = video(seen).metadata
    assert record["second_pass"]["lpl"]["leapt"]
    assert steps(seen)[-1].t == pytest.approx(record["second_pass"]["lpl"]["t"], abs=1e-3)


@pytest.mark.parametrize(("strength", "after"), [(0, (2,)), (0.6, (1, 3, 6))])
def test_interrupted_runs_continue_exactly(
    pipe: Pipeline, tmp_path: Path, strength: float, after: tuple[int, ...]
) -> None:
    options = {**REFINED, "width": 16, "height": 16, "refine": "24x24", "steps": 2}
    options |= {"refine_strength": strength, "loop": 2, "num_frames": 34}
    options |= {"step_cache": "every:2,warmup=1", "sampler": "ab2"}
    whole = check_resumes(pipe, tmp_path, options, after=after, decode=True)
    assert len(whole.latents) == (8 if strength else 4)


def test_windows_are_refined_together(pipe: Pipeline) -> None:
    more = {"loop": 2, "num_frames": 34, "steps": 2, "long": "windows", "guidance": 1}
    plain = pipe(**OPTIONS | more | LARGE)
    seen = events(pipe, **more, refine_strength=1)
    assert np.array_equal(video(seen).frames, plain.frames)
    assert len(steps(seen)) == 4


def test_an_image(pipe: Pipeline) -> None:
    made = video(events(pipe, num_frames=1))
    assert (made.width, made.height, made.num_frames) == (48, 40, 1)
    replayed = pipe(**{"prompt": "", **replay_options(made.metadata)})
    assert np.array_equal(replayed.frames, made.frames)


def test_progress_covers_both_passes(pipe: Pipeline, tmp_path: Path) -> None:
    progress, shares, titles = RunProgress(), list[float](), dict[str, None]()
    output = tmp_path / "a.gif"
    more = {"output": str(output), "preview_every": 1, "keep_previews": True, "loop": 2}
    seen = events(pipe, **more, num_frames=34, steps=2, scale=2)
    for event in seen:
        progress.handle(event)
        shares.append(progress.fraction)
        titles[f"{progress.stage}{progress.place}"] = None
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert "denoise clip 2 of 2 pass 1 of 2" in titles
    assert "denoise clip 2 of 2 pass 2 of 2" in titles
    paths = [event.path for event in seen if isinstance(event, PreviewReady)]
    assert len(set(paths)) == len(steps(seen)) == 8
    assert [Path(path).name for path in paths if path][:3] == [
        "a.preview.clip-1-step-1.gif",
        "a.preview.clip-1-step-2.gif",
        "a.preview.clip-1-pass-2-step-1.gif",
    ]
    assert (video(seen).width, video(seen).height) == (96, 80)


def test_the_plan_has_both_passes(pipe: Pipeline) -> None:
    request = GenerationRequest.from_dict({**REFINED, "memory_budget": "off"})
    plan, plain = pipe.plan(request), pipe.plan(GenerationRequest.from_dict(OPTIONS | LARGE))
    names = [stage.stage for stage in plan.stages]
    assert names == ["encode", "denoise", "decode", "read", "denoise", "decode"]
    first, second = (stage.flops for stage in plan.stages if stage.stage == "denoise")
    assert first < second
    some, whole = (
        pipe.plan(GenerationRequest.from_dict({**REFINED, "refine_strength": strength}))
        for strength in (0.1, 1)
    )
    assert some.stage("denoise").flops < whole.stage("denoise").flops == second
    for name in ("denoise", "decode"):
        assert whole.stage(name).flops == plain.stage(name).flops
    assert plan.stage("denoise").flops == second
    with pytest.raises(MemoryBudgetError) as refused:
        pipe.plan(GenerationRequest.from_dict({**REFINED, "memory_budget": "101MB"}))
    budget = re.search(r"--memory-budget (\S+)", refused.value.in_flags[1])
    assert budget is not None
    within = pipe.plan(GenerationRequest.from_dict({**REFINED, "memory_budget": budget[1]}))
    assert within.peak <= parse_bytes(budget[1])


def test_the_estimate_tells_the_second_pass(pipe: Pipeline) -> None:
    run = pipe.prepare(GenerationRequest.from_dict(REFINED))
    first = pipe.prepare(GenerationRequest.from_dict(OPTIONS)).estimate(SPEEDS)
    found = run.estimate(SPEEDS)
    assert found.second_pass is not None
    assert found.total == pytest.approx(first.total + found.second_pass, rel=1e-3)
    record = estimate_record(found)
    assert record["second_pass_seconds"] == pytest.approx(found.second_pass, abs=1e-3)
    assert "of it the second pass" in estimate_lines(found)[0]


def test_the_server_offers_a_smaller_second_pass(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {name: value for name, value in REFINED.items() if name != "seed"}
    found = plan_task(pipe, "generate", {**options, "refine": "256x256"}, {}, "/tmp/a")
    assert (found.width, found.height, found.steps) == (256, 256, 4)
    assert sum(found.shares.values()) == pytest.approx(1, abs=1e-3)
    monkeypatch.setattr(planning, "machine_capacity", lambda: 230_000_000)
    refused = plan_task(pipe, "generate", {**options, "refine": "512x512"}, {}, "/tmp/a")
    assert not refused.fits
    assert "refine" in {name for offer in refused.suggestions for name in offer}


def test_what_it_refuses(pipe: Pipeline) -> None:
    for options, message in (
        ({"width": 64, "height": 64}, "48x40 pixels is smaller than the first of 64x64"),
        ({"refine": "large"}, "must be WIDTHxHEIGHT or one of 144p"),
        ({"refine_strength": 1.5}, "out of range"),
    ):
        with pytest.raises(UsageError, match=message):
            pipe.plan(GenerationRequest.from_dict({**REFINED, **options}))


@pytest.mark.parametrize(
    ("first", "text", "size"),
    [
        (Size(426, 240), "720p", Size(1280, 720)),
        (Size(240, 426), "720p", Size(720, 1280)),
        (Size(64, 64), "144p", Size(192, 192)),
        (Size(424, 240), "850x480", Size(850, 480)),
        (Size(426, 240), "240p", Size(426, 240)),
    ],
)
def test_a_resolution_keeps_the_ratio(first: Size, text: str, size: Size) -> None:
    assert refined_size(first, text) == size


def test_warnings_come_once(pipe: Pipeline) -> None:
    seen = events(pipe, steps=1, tdtm="3")
    messages = [event.message for event in seen if isinstance(event, Warned)]
    assert len(messages) == len(set(messages))
    assert sum("--tdtm 3 covers all" in text for text in messages) == 1
    unused = pipe.prepare(GenerationRequest.from_dict({**OPTIONS, "refine_strength": 0.5}))
    assert "--refine-strength has no effect without --refine." in unused.result.warnings
