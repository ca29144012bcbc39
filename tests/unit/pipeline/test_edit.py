"""Edits on the bundled model: the way back and forth, shared values, and what cannot be edited."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import Pipeline, Video
from mlx_sora.errors import MemoryBudgetError, UsageError
from mlx_sora.loading.networks import load_vae
from mlx_sora.request.edit import INJECT_STEPS, EditRequest
from mlx_sora.request.generation import GenerationRequest, options_of
from mlx_sora.runtime.events import Event, Finished, Noted, StepFinished, Warned
from mlx_sora.video.frames import to_uint8
from mlx_sora.video.metadata import read_metadata, replay_options
from mlx_sora.video.reader import read_video
from mlx_sora.video.writer import save_frames

SOURCE, TARGET = "a red square on a black background", "a blue square on a black background"
SMALL = {"source_prompt": SOURCE, "prompt": TARGET, "steps": 3, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 frames of a red square that moves to the right."""
    frames = np.full((17, 32, 32, 3), 8, np.uint8)
    for i, frame in enumerate(frames):
        frame[10:22, 4 + i // 2 : 16 + i // 2] = (220, 40, 40)
    return save_frames(tmp_path_factory.mktemp("clip") / "a.mp4", frames, 12, None, False)


@pytest.fixture(scope="module")
def edited(pipe: Pipeline, clip: Path) -> Video:
    return pipe.edit(clip, **SMALL)


def events(pipe: Pipeline, clip: Path, **asked: object) -> list[Event]:
    return list(pipe.stream_edit(EditRequest.from_options(clip, {**SMALL, **asked})))


def latents(run: list[Event]) -> list[mx.array]:
    return [event.latents for event in run if isinstance(event, StepFinished)]


def frames(video: Video) -> np.ndarray:
    assert video.frames is not None
    return video.frames


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_back_and_forth_under_one_prompt_is_the_video(pipe: Pipeline, clip: Path) -> None:
    """As good as the VAE keeps it, and better than Euler steps with the same work."""
    source = read_video(clip).frames
    vae = load_vae(pipe.model, ("encoder", "decoder"))
    z = vae.encode(mx.array(source)[None].astype(mx.float32) / 127.5 - 1)
    kept = np.concatenate([to_uint8(chunk) for chunk in vae.decode_chunks(z, len(source))])
    same = {**SMALL, "prompt": SOURCE, "guidance": 1.0, "inject_steps": 0}
    halves, lines = (
        psnr(kept, frames(pipe.edit(clip, **{**same, "sampler": name, "steps": steps})))
        for name, steps in (("midpoint", 10), ("rflow", 20))
    )
    assert halves > 25
    assert halves > lines + 3


def test_an_edit_survives_json() -> None:
    """Its sampler too, which is not the one that an edit has by itself."""
    edit = EditRequest.from_options("a.mp4", {**SMALL, "sampler": "rflow", "inject_steps": 1})
    assert EditRequest.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit


def test_the_record_tells_the_edit(edited: Video, clip: Path) -> None:
    assert edited.metadata["edit"] == {
        "video": clip.name,
        "source_prompt": SOURCE,
        "inject_steps": INJECT_STEPS,
    }
    assert edited.metadata["settings"]["sampler"] == "midpoint"
    assert (edited.num_frames, edited.fps, edited.seed) == (17, 12, 0)
    assert list(edited.timings) == ["encode", "read", "denoise", "decode"]
    assert frames(edited).shape == (17, 32, 32, 3)


def test_same_edit_same_bytes_in_any_memory(pipe: Pipeline, clip: Path, edited: Video) -> None:
    assert np.array_equal(frames(pipe.edit(clip, **SMALL)), frames(edited))
    streamed = pipe.edit(clip, **SMALL, ci_dl=True)
    assert streamed.metadata["accelerations"]["ci_dl"]["denoise"]["loads"] > 0
    assert np.array_equal(frames(streamed), frames(edited))
    apart = frames(pipe.edit(clip, **SMALL, sequential_guidance=True))
    assert np.abs(apart.astype(int) - frames(edited)).max() <= 1


def test_the_way_back_comes_first_and_knows_only_the_source(pipe: Pipeline, clip: Path) -> None:
    run = events(pipe, clip)
    steps = [event for event in run if isinstance(event, StepFinished)]
    assert [step.step for step in steps] == list(range(6))
    assert {step.total for step in steps} == {6}
    times = [step.t for step in steps]
    assert times[:3] == sorted(times[:3])
    assert times[3:] == sorted(times[3:], reverse=True)
    other = latents(events(pipe, clip, prompt="a green circle", guidance=4.0))
    for a, b in zip(latents(run)[:3], other[:3], strict=True):
        assert mx.array_equal(a, b)
    assert not mx.array_equal(latents(run)[3], other[3])


def test_shared_values_matter_in_their_steps_only(pipe: Pipeline, clip: Path) -> None:
    runs = [latents(events(pipe, clip, inject_steps=n)) for n in (0, 1, 2)]
    assert mx.array_equal(runs[0][2], runs[1][2])  # keeping changes nothing on the way back
    assert not mx.array_equal(runs[0][3], runs[1][3])
    assert mx.array_equal(runs[1][3], runs[2][3])
    assert not mx.array_equal(runs[1][4], runs[2][4])


def test_what_is_kept_is_planned_and_told(pipe: Pipeline, clip: Path) -> None:
    def peak(inject: int) -> int:
        edit = EditRequest.from_options(clip, {**SMALL, "inject_steps": inject, "dtype": "float32"})
        return pipe.plan_edit(edit).stage("denoise").peak

    run = events(pipe, clip, inject_steps=2)
    notes = [event.message for event in run if isinstance(event, Noted)]
    assert any("4 evaluations" in note for note in notes)
    assert pipe.plan_edit(EditRequest.from_options(clip, SMALL)).stage("read").flops > 0
    # 5 latent frames of 2 x 2 tokens, 128 channels, 4 blocks, float32.
    assert peak(2) - peak(0) == 4 * 4 * (5 * 2 * 2) * 128 * 4
    plain = pipe.plan(GenerationRequest(prompt=TARGET, steps=3, width=32, height=32))
    edit = EditRequest.from_options(clip, {**SMALL, "sampler": "rflow", "guidance": 2.0})
    assert pipe.plan_edit(edit).stage("denoise").flops > plain.stage("denoise").flops


def test_a_negative_prompt_counts_on_the_way_forth(pipe: Pipeline, clip: Path) -> None:
    plain, negative = (
        latents(events(pipe, clip, negative_prompt=text)) for text in (None, "a green circle")
    )
    assert mx.array_equal(plain[2], negative[2])
    assert not mx.array_equal(plain[3], negative[3])


def test_techniques_work_on_the_way_forth(pipe: Pipeline, clip: Path) -> None:
    run = events(pipe, clip, lpl="fixed:1", tdtm=1)
    assert len(latents(run)) == 3 + 2
    last = run[-1]
    assert isinstance(last, Finished)
    done = last.video.metadata["accelerations"]
    assert done["lpl"] == done["lpl"] | {"after_steps": 1, "evaluations_saved": 3}
    assert done["tdtm"]["merged_steps"] == 1


def test_a_picture_is_a_video_of_one_frame(pipe: Pipeline, tmp_path: Path) -> None:
    picture = np.full((1, 48, 32, 3), 200, np.uint8)
    path = save_frames(tmp_path / "a.png", picture, 1, None, False)
    run = events(pipe, path, output=str(tmp_path / "b.png"))
    warnings = [event.message for event in run if isinstance(event, Warned)]
    assert warnings[-1] == f"{path}: 32x48, cropped to 32x32."
    assert (tmp_path / "b.png").is_file()


def test_the_first_frames_of_a_long_video(pipe: Pipeline, tmp_path: Path) -> None:
    shades = np.arange(40, dtype=np.uint8)[:, None, None, None]
    path = save_frames(tmp_path / "a.mp4", np.tile(shades, (1, 32, 32, 3)), 24, None, False)
    edit = EditRequest.from_options(path, {**SMALL, "num_frames": 20, "steps": 1})
    *_, last = pipe.stream_edit(edit)
    assert isinstance(last, Finished)
    assert last.video.num_frames == 20


def test_an_edit_is_not_replayed_as_a_generation(
    pipe: Pipeline, clip: Path, tmp_path: Path
) -> None:
    pipe.edit(clip, **{**SMALL, "steps": 1}, output=str(tmp_path / "b.mp4"))
    with pytest.raises(UsageError, match="is an edit"):
        replay_options(read_metadata(tmp_path / "b.mp4"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"source_prompt": " "}, "source prompt is empty"),
        ({"prompt": ""}, "prompt is empty"),
        ({"inject_steps": 4}, "inject_steps 4 is out of range. Give 0 to 3"),
        ({"inject_steps": -1}, "out of range"),
        ({"inject_steps": "many"}, "inject_steps must be a whole number"),
        ({"num_frames": 34}, "has 17 frames, 34 were asked for"),
        ({"seed": 3}, "no option 'seed'"),
        ({"lop": 3}, "no option 'lop'"),
    ],
)
def test_what_cannot_be_asked(
    pipe: Pipeline, clip: Path, asked: Mapping[str, object], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        pipe.stream_edit(EditRequest.from_options(clip, {**SMALL, **asked}))


def test_a_request_made_by_hand_is_checked_too(pipe: Pipeline, clip: Path) -> None:
    edit = EditRequest(str(clip), SOURCE, GenerationRequest(prompt=TARGET, seed=4))
    with pytest.raises(UsageError, match="An edit does not use seed"):
        pipe.stream_edit(edit)
    with pytest.raises(UsageError, match="source_prompt is missing"):
        EditRequest.from_options(clip, {"prompt": TARGET})


def test_an_edit_shares_options_that_there_are() -> None:
    left_out = {"seed", "images", "videos", "mask_strategy", "references", "loop"}
    assert left_out.isdisjoint(options_of("edit"))


def test_what_cannot_be_edited(pipe: Pipeline, tmp_path: Path) -> None:
    short = save_frames(tmp_path / "a.mp4", np.zeros((5, 32, 32, 3), np.uint8), 24, None, False)
    broken = tmp_path / "b.mp4"
    broken.write_bytes(b"no video")
    for path, said in (
        (short, "5 frames"),
        (broken, "Cannot read"),
        (tmp_path / "c.mp4", "No such"),
    ):
        with pytest.raises(UsageError, match=said):
            pipe.stream_edit(EditRequest.from_options(path, SMALL))


def test_values_that_do_not_fit_are_refused_before_any_work(pipe: Pipeline, clip: Path) -> None:
    def edit(**more: object) -> EditRequest:
        return EditRequest.from_options(clip, {**SMALL, "steps": 900, "dtype": "float32", **more})

    budget = pipe.plan_edit(edit(inject_steps=0)).smallest
    with pytest.raises(MemoryBudgetError):
        pipe.stream_edit(edit(inject_steps=900, memory_budget=f"{budget / 1e6 + 1:.0f}MB"))
