"""Videos from pictures, from videos and from each other, on the bundled model."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from benchmarks.shapes import world
from mlx_sora import GenerationRequest, Pipeline, Video
from mlx_sora.errors import MemoryBudgetError, UsageError
from mlx_sora.memory.profiles import parse_bytes
from mlx_sora.pipeline.settings import resolve
from mlx_sora.request.generation import IMAGE_GUIDANCE
from mlx_sora.runtime.events import Event, Finished, Noted, StageStarted, StepFinished, Warned
from mlx_sora.video.metadata import read_metadata, replay_options
from mlx_sora.video.reader import read_video
from mlx_sora.video.writer import save_frames

TRUTH = world.Attributes("red", "square", "right", "black")
PROMPT = world.caption(TRUTH)


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    path = world.Path((18, 32), (46, 32), 10, 10)
    return world.render(TRUTH, path, np.linspace(0, 1, 34))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, real: np.ndarray) -> Path:
    """first.png, last.png and clip.mp4 of the same video."""
    path = tmp_path_factory.mktemp("media")
    Image.fromarray(real[0]).save(path / "first.png")
    Image.fromarray(real[-1]).save(path / "last.png")
    save_frames(path / "clip.mp4", real, 24)
    return path


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def run(pipe: Pipeline, **options: object) -> tuple[Video, list[Event]]:
    values = {"prompt": PROMPT, "seed": 1, "steps": 2, **options}
    events = list(pipe.stream(GenerationRequest.from_dict(values)))
    finished = events[-1]
    assert isinstance(finished, Finished)
    return finished.video, events


def made(pipe: Pipeline, **options: object) -> np.ndarray:
    frames = run(pipe, **options)[0].frames
    assert frames is not None
    return frames


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def test_a_picture_is_shown_where_it_is_asked_for(pipe: Pipeline, real: np.ndarray) -> None:
    frames = made(pipe, images=["first.png", ["last.png", "last"]], steps=6)
    plain = made(pipe, steps=6)
    for index, given in ((0, real[0]), (-1, real[-1])):
        assert error(frames[index], given) < 12
        assert error(frames[index], given) < error(plain[index], given)


def test_the_stage_and_the_sizes_are_told(pipe: Pipeline, folder: Path) -> None:
    Image.new("L", (90, 64), 128).save(folder / "wide.png")
    _, events = run(pipe, images="wide.png", steps=1)
    assert [e.stage for e in events if isinstance(e, StageStarted)] == [
        "encode",
        "read",
        "denoise",
        "decode",
    ]
    notes = [e.message for e in events if isinstance(e, Noted)]
    assert notes == ["wide.png: 90x64, cropped to 64x64."]


def test_a_video_goes_on(pipe: Pipeline, real: np.ndarray) -> None:
    both = [["clip.mp4", "before", 17], ["clip.mp4", "after", 4]]
    frames = made(pipe, videos=both, num_frames=34)
    assert error(frames[:17], real[17:]) < 8
    assert error(frames[-1], real[3]) < 16


def test_a_mask_strategy_does_the_same(pipe: Pipeline) -> None:
    strategy, short = "0,0,0,5,5", {"num_frames": 34, "steps": 1}
    ours = made(pipe, videos=[["clip.mp4", "after", 17]], **short)
    theirs = made(pipe, references="clip.mp4", mask_strategy=strategy, **short)
    assert np.array_equal(ours, theirs)
    written = f'{{"reference_path": "clip.mp4", "mask_strategy": "{strategy}"}}'
    assert np.array_equal(ours, made(pipe, prompt=PROMPT + written, **short))


def test_strength_lies_between_keeping_and_none(pipe: Pipeline) -> None:
    whole, half, plain = (
        made(pipe, steps=4, **options)
        for options in ({"images": "last.png"}, {"images": [["last.png", 0, 0.5]]}, {})
    )
    assert 0 < error(half[0], whole[0]) < error(plain[0], whole[0])


def test_an_image_from_an_image(pipe: Pipeline, real: np.ndarray) -> None:
    frames = made(pipe, images=[["first.png", 0, 0.8]], num_frames=1, steps=6)
    assert frames.shape == (1, 64, 64, 3)
    assert error(frames[0], real[0]) < error(made(pipe, num_frames=1, steps=6)[0], real[0])


@pytest.mark.parametrize(
    "options",
    [
        {"lpl": "fixed:1", "tdtm": "all", "ci_dl": True, "image_guidance": "noised"},
        {"memory_budget": "1GB", "sequential_guidance": True, "sampler": "midpoint"},
        {"step_cache": "every:2,warmup=1", "guidance_cache": "every:2", "image_guidance": "joint"},
        {"guidance": 1, "sampler": "ab2"},
    ],
    ids=str,
)
def test_with_everything_else(pipe: Pipeline, real: np.ndarray, options: dict[str, object]) -> None:
    frames = made(pipe, videos="clip.mp4", num_frames=34, **options)
    assert error(frames[:17], real[17:]) < 8


def test_image_guidance_changes_all_but_the_image(pipe: Pipeline) -> None:
    """The first latent stays; the way in which denoising sees it decides the others."""
    ends = {}
    for mode in IMAGE_GUIDANCE:
        _, events = run(pipe, images="first.png", image_guidance=mode)
        latents = [e.latents for e in events if isinstance(e, StepFinished)][-1]
        ends[mode] = np.array(latents)
    clean, *others = ends.values()
    for other in others:
        assert np.array_equal(other[:, 0], clean[:, 0])
        assert np.abs(other[:, 1:] - clean[:, 1:]).max() > 1e-2
    unguided = {"images": "first.png", "guidance": 1, "steps": 1}
    clean, joint, noised = (made(pipe, **unguided, image_guidance=m) for m in IMAGE_GUIDANCE)
    assert np.array_equal(joint, clean)
    assert not np.array_equal(noised, clean)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_guidance": "noised"}, "noised has no effect without an image"),
        ({"image_guidance": "joint", "loop": 2, "num_frames": 34, "guidance": 1}, "out guidance"),
        ({"image_guidance": "joint", "loop": 2, "num_frames": 34}, ""),
    ],
    ids=str,
)
def test_image_guidance_without_effect_warns(
    pipe: Pipeline, options: dict[str, object], says: str
) -> None:
    request = GenerationRequest.from_dict({"prompt": PROMPT, "seed": 1, **options})
    warnings = " ".join(resolve(request, pipe.model).warnings)
    assert says in warnings if says else "--image-guidance" not in warnings


def test_loops_share_frames_without_repeating_them(pipe: Pipeline) -> None:
    video, events = run(pipe, loop=3, num_frames=34, lpl="fixed:0", ci_dl=True)
    assert video.frames is not None
    assert video.num_frames == len(video.frames) == 34 + 2 * 17
    stages = [e.stage for e in events if isinstance(e, StageStarted)]
    assert stages == ["encode", *["denoise", "decode"] * 3]
    assert np.array_equal(video.frames[:34], made(pipe, num_frames=34, lpl="fixed:0"))
    assert len(video.metadata["accelerations"]["lpl"]) == 3
    assert not np.array_equal(video.frames[34:51], video.frames[51:])


def test_a_given_latent_ends_one_clip_and_begins_the_next(pipe: Pipeline) -> None:
    """With nothing made anew, a clip's first frames are the last of the one before it."""
    from mlx_sora.conditioning.latents import ConditioningLatents
    from mlx_sora.sampling.noise import Noise

    request = GenerationRequest(prompt="p", seed=1, loop=3, num_frames=34)
    media = resolve(request, pipe.model).media
    given, shape = ConditioningLatents(media, (10, 8, 8), 4), (10, 8, 8, 4)
    z, conditioning = given.initial_latents(0, Noise([1], shape, 0))
    assert conditioning is None
    given.remember(0, z)
    following, conditioning = given.initial_latents(1, Noise([1], shape, 1))
    assert conditioning is not None
    assert conditioning.mask.tolist() == [[0] * 5 + [1] * 5]
    assert mx.array_equal(following[:, :5], z[:, 5:])
    assert not mx.array_equal(following[:, 5:], z[:, 5:])
    given.remember(1, following)
    assert list(given._generated) == [1]  # the first clip is not asked for any more


def test_memory_does_not_grow_with_the_number_of_clips(pipe: Pipeline) -> None:
    mx.clear_cache()
    request = GenerationRequest(prompt=PROMPT, seed=1, steps=1, loop=3, num_frames=34)
    alive = [
        mx.get_active_memory()
        for event in pipe.stream(request)
        if isinstance(event, StageStarted) and event.stage == "denoise"
    ]
    assert max(alive[1:]) - min(alive[1:]) < 10_000


def test_scenes_follow_each_other(pipe: Pipeline) -> None:
    other = "a blue circle growing on a white background"
    video, _ = run(pipe, prompt=f"|0|{PROMPT}|1|{other}", loop=2, num_frames=34, steps=1)
    plain = made(pipe, loop=2, num_frames=34, steps=1)
    assert video.frames is not None
    assert np.array_equal(video.frames[:34], plain[:34])
    assert not np.array_equal(video.frames[34:], plain[34:])
    assert video.metadata["settings"]["scenes"] == [PROMPT, other]


def test_a_negative_prompt_replaces_the_empty_one(pipe: Pipeline) -> None:
    plain, video = made(pipe), run(pipe, negative_prompt="A Red Square")[0]
    assert not np.array_equal(video.frames, plain)
    assert video.metadata["settings"]["negative_text"] == "a red square"
    _, events = run(pipe, negative_prompt="x", guidance=1)
    assert any("no effect" in e.message for e in events if isinstance(e, Warned))
    one_by_one = made(pipe, negative_prompt="A Red Square", sequential_guidance=True)
    assert np.abs(one_by_one.astype(int) - video.frames.astype(int)).max() <= 1  # type: ignore[union-attr]


def test_the_file_replays_its_conditioning(pipe: Pipeline, tmp_path: Path) -> None:
    video, _ = run(
        pipe,
        images=["first.png", ["last.png", "last", 0.5]],
        loop=2,
        num_frames=34,
        condition_edit=0.25,
        negative_prompt="a circle",
        output=tmp_path / "a.mp4",
    )
    assert video.path is not None
    record = read_metadata(video.path)
    assert [item["path"] for item in record["settings"]["media"]] == ["first.png", "last.png"]
    again = pipe(**replay_options(record) | {"model": None})
    written = read_video(video.path).frames
    assert again.frames is not None
    assert again.frames.shape == written.shape == (51, 64, 64, 3)
    assert error(again.frames, written) < 4


def test_the_plan_counts_reading_and_clips(pipe: Pipeline) -> None:
    def plan(**options: object) -> dict[str, int]:
        values = {"prompt": PROMPT, "num_frames": 34, **options}
        stages = pipe.plan(GenerationRequest.from_dict(values)).stages
        return {stage.stage: stage.flops for stage in stages}

    once, thrice, reading = plan(), plan(loop=3), plan(images="first.png")
    assert thrice["denoise"] == 3 * once["denoise"]
    assert thrice["decode"] == 2 * once["decode"]
    assert list(reading) == ["encode", "read", "denoise", "decode"]
    assert reading["read"] > 0
    two = plan(images=["first.png", ["last.png", "last"]])
    assert two["read"] == 2 * reading["read"]


def test_what_cannot_be_read_within_the_budget_is_refused(pipe: Pipeline) -> None:
    options = {"prompt": PROMPT, "images": "first.png", "width": 512, "height": 512}
    smallest = pipe.plan(GenerationRequest.from_dict(options)).smallest
    with pytest.raises(MemoryBudgetError):
        pipe(**options, memory_budget=f"{smallest - parse_bytes('1MB')}B")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"images": "none.png"},
        {"videos": "clip.mp4", "num_frames": 17},
        {"loop": 2, "num_frames": 17},
        {"loop": 2, "num_frames": 20},
        {"loop": 0},
        {"condition_edit": 2},
        {"loop": 2, "condition_frames": 5, "num_frames": 34},
        {"images": [["first.png", 17]]},
    ],
    ids=str,
)
def test_bad_conditioning_fails_before_any_work(pipe: Pipeline, options: dict[str, object]) -> None:
    with pytest.raises(UsageError) as error:
        pipe(PROMPT, **options)
    assert "\n" not in str(error.value)
