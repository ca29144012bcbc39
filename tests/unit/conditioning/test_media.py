"""What media come to on a clip's frames, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_sora.conditioning.clips import Clips
from mlx_sora.conditioning.latents import encode_tasks
from mlx_sora.conditioning.media import Media, frames_by_latent, plan_media
from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size, latent_frames
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.text.prompt import PromptDirectives
from mlx_sora.utils.files import sha256
from mlx_sora.video.writer import save_frames

SIZE = Size(16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.png, b.png of one colour each, and clip.mp4 of 40 frames that grow lighter."""
    path = tmp_path_factory.mktemp("media")
    for name, shade in (("a.png", 50), ("b.png", 200)):
        Image.fromarray(np.full((20, 30, 3), shade, np.uint8)).save(path / name)
    shades = np.arange(40, 200, 4, dtype=np.uint8)
    save_frames(
        path / "clip.mp4", np.broadcast_to(shades[:, None, None, None], (40, 16, 16, 3)), 24
    )
    return path


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def media(clips: Clips = Clips(51), **options: object) -> Media:  # noqa: B008
    request = GenerationRequest.from_dict({"prompt": "p", **options})
    return plan_media(request, PromptDirectives(), clips, SIZE, 24)


def kept(mask: list[float]) -> list[int]:
    return [index for index, value in enumerate(mask) if value == 0]


@pytest.mark.parametrize("frames", [1, 17, 20, 34, 42, 51])
def test_every_frame_is_shown_by_one_latent(frames: int) -> None:
    shown = frames_by_latent(frames)
    assert len(shown) == latent_frames(frames)
    assert [frame for each in shown for frame in each] == list(range(frames))
    assert len(shown[0]) == 1 + (frames % 17 - 1) % 4 if frames < 17 else len(shown[0]) == 1


@pytest.mark.parametrize(
    ("images", "latents"),
    [
        (["a.png"], [0]),
        ([["a.png", "last"]], [14]),
        ([["a.png", 17]], [5]),
        ([["a.png", 18]], [6]),
        (["a.png", ["b.png", -1]], [0, 14]),
    ],
)
def test_a_picture_keeps_the_latent_that_shows_its_frame(
    images: list[object], latents: list[int]
) -> None:
    assert kept(media(images=images).mask(0)) == latents


@pytest.mark.parametrize(
    ("video", "latents"),
    [
        (["clip.mp4"], [0, 1, 2, 3, 4]),
        (["clip.mp4", "before", 1], [0]),
        (["clip.mp4", "before", 20], [0, 1, 2, 3, 4, 5]),
        (["clip.mp4", "after"], [10, 11, 12, 13, 14]),
        (["clip.mp4", "after", 6], [14]),
    ],
)
def test_a_video_keeps_the_latents_it_shows_whole(video: list[object], latents: list[int]) -> None:
    assert kept(media(videos=[video]).mask(0)) == latents


def test_two_videos_are_connected() -> None:
    both = media(videos=["clip.mp4", ["clip.mp4", "after"]])
    assert kept(both.mask(0)) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    first, last = both.media_clips
    assert (first.start, last.start) == (23, 0)


def test_strength_is_what_is_not_made_anew() -> None:
    assert media(images=[["a.png", 0, 0.75]]).mask(0)[0] == 0.25


def test_frames_are_counted_over_all_clips() -> None:
    clips = Clips(51, 3, 17)
    plan = media(clips, images=[["a.png", 60], ["b.png", "last"]])
    assert [(p.clip, p.frames.start) for p in plan.media_clips] == [(1, 26), (2, 50)]
    assert kept(plan.mask(0)) == []
    assert kept(plan.mask(1)) == [0, 1, 2, 3, 4, 8]
    assert kept(plan.mask(2)) == [0, 1, 2, 3, 4, 14]
    assert media(clips, condition_edit=0.25).mask(1)[:6] == [0.25] * 5 + [1]


def test_every_clip_begins_with_the_one_before() -> None:
    plan = media(Clips(51, 3, 17), references=["a.png"], mask_strategy="0;1,0,0,-1")
    assert [str(p) for p in plan.mask_groups] == [
        "0,0,0,0,1,0.0",
        "1,0,0,-1,1,0.0",
        "1,1,-5,0,5,0.0",
        "2,2,-5,0,5,0.0",
    ]
    assert kept(plan.mask(1)) == [0, 1, 2, 3, 4, 10]
    assert "go to 10" in plan.warnings[0]  # -1 is moved to the start of the last chunk


def test_settings_in_the_prompt_come_first() -> None:
    request = GenerationRequest(prompt="p", references="b.png", mask_strategy="0")  # type: ignore[arg-type]
    written = PromptDirectives("a.png;clip.mp4", "0,1,0,0,5")
    plan = plan_media(request, written, Clips(51), SIZE, 24)
    assert [source.path for source in plan.references] == ["a.png", "clip.mp4"]
    assert kept(plan.mask(0)) == [0, 1, 2, 3, 4]


def test_only_chunks_that_are_needed_are_read() -> None:
    plan = media(images=["a.png", ["b.png", "last"]])
    first, last = encode_tasks(plan, SIZE)
    assert (first.latents, last.latents) == (range(5), range(10, 15))
    # Between given frames lie the nearest of them.
    assert [int(frame.mean()) for frame in first.read()] == [50] * 17
    assert [int(frame.mean()) for frame in last.read()] == [200] * 17
    (still,) = encode_tasks(media(references=["a.png"], mask_strategy="0"), SIZE)
    assert (still.latents, still.frames) == (range(1), 17)
    (tail,) = encode_tasks(media(references=["clip.mp4"], mask_strategy="0,0,5,0,5"), SIZE)
    assert (tail.latents, tail.frames) == (range(5, 10), 17)
    assert abs(float(tail.read()[0].mean()) - (40 + 4 * 17)) < 4


def test_the_last_frames_of_a_video_are_laid_at_the_start() -> None:
    (task,) = encode_tasks(media(videos=[["clip.mp4", "before", 5]]), SIZE)
    pixels = task.read().mean(axis=(1, 2, 3))
    assert np.abs(pixels[:5] - (40 + 4 * np.arange(35, 40))).max() < 4
    assert np.abs(pixels[5:] - pixels[4]).max() == 0


def test_a_single_image_is_encoded_alone() -> None:
    (task,) = encode_tasks(media(Clips(1), images=[["a.png", 0, 0.5]]), SIZE)
    assert (task.frames, task.latents) == (1, range(1))


def test_what_happens_to_media_is_said_and_recorded() -> None:
    plan = media(images=["a.png"], videos=[["clip.mp4", "after"]])
    assert plan.notes == (
        "a.png: 30x20, scaled to 24x16, cropped to 16x16.",
        "clip.mp4: 16x16, as it is.",
    )
    assert plan.to_metadata()[1] == {
        "path": "clip.mp4",
        "sha256": sha256(Path("clip.mp4")),
        "size": "16x16",
        "num_frames": 40,
    }
    request = GenerationRequest(prompt="p", videos="clip.mp4")  # type: ignore[arg-type]
    (warning,) = plan_media(request, PromptDirectives(), Clips(51), SIZE, 12).warnings
    assert "24 frames per second" in warning


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"images": ["none.png"]}, "No such file: none.png"),
        ({"videos": ["none.mp4"]}, "No such file: none.mp4"),
        ({"images": ["clip.mp4"]}, "is a video"),
        ({"videos": ["a.png"]}, "is an image"),
        ({"images": [["a.png", 51]]}, "frame 51 is out of range"),
        ({"images": [["a.png", -52]]}, "frame -52 is out of range"),
        ({"images": ["a.png", "b.png"]}, "same frames"),
        ({"images": ["a.png"], "videos": ["clip.mp4"]}, "same frames"),
        ({"images": [["a.png", 1], ["b.png", 4]]}, "same frames"),
        ({"videos": [["clip.mp4", "before", 41]]}, "40 frames, 41"),
        ({"videos": [["clip.mp4", "after", 3]]}, "encodes 4 frames"),
        ({"references": ["a.png"]}, "without a mask strategy"),
        ({"mask_strategy": "0"}, "reference 0 is out of range: 0 given"),
        ({"references": ["a.png"], "mask_strategy": "0,1"}, "reference 1 is out of range: 1 given"),
        ({"references": ["a.png"], "mask_strategy": "1"}, "loop 1 is out of range: 1 made"),
        ({"references": ["a.png"], "mask_strategy": "-1"}, "loop -1 is out of range"),
        (
            {"references": ["a.png"], "mask_strategy": "0,0,1"},
            "reference start 1 is out of range: 1 latent",
        ),
        (
            {"references": ["a.png"], "mask_strategy": "0,0,0,15"},
            "target start 15 is out of range: 15",
        ),
        ({"references": ["a.png"], "mask_strategy": "0,0,0,0,0"}, "length 0 is below 1"),
        ({"references": ["a.png"], "mask_strategy": "0,0,0,0,1,2"}, "edit ratio 2 is not"),
        ({"references": ["a.png"], "mask_strategy": "zero"}, "Cannot parse"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_does_not_fit_is_one_line(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        media(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("frames", "options"),
    [
        (17, {"videos": ["clip.mp4"]}),
        (1, {"images": ["a.png"]}),
        (34, {"videos": ["clip.mp4", ["clip.mp4", "after"]]}),
        (17, {"references": ["clip.mp4"], "mask_strategy": "0,0,0,0,5"}),
    ],
    ids=str,
)
def test_a_mask_that_covers_everything_is_refused(frames: int, options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="nothing is left to generate"):
        media(Clips(frames), **options)
