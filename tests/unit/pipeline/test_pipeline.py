"""The pipeline on the bundled model: determinism, lifetimes, metadata, and what goes wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline, Video
from mlx_sora.errors import NumericsError, UsageError, WeightsError
from mlx_sora.loading.model_folder import find_model
from mlx_sora.runtime.events import (
    STAGES,
    Event,
    Finished,
    StageFinished,
    StageProgress,
    StageStarted,
    StepFinished,
    Warned,
)
from mlx_sora.video.metadata import read_metadata, replay_options

PROMPT = "a red circle moving right on a black background"


@pytest.fixture(scope="module")
def video(pipe: Pipeline) -> Video:
    return pipe(PROMPT, seed=1, steps=3)


@pytest.fixture
def copy_of_model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_model("shapes").path, tmp_path / "model"))


def events_of(pipe: Pipeline, **options: object) -> list[Event]:
    return list(pipe.stream(GenerationRequest.from_dict({"prompt": PROMPT, "steps": 2, **options})))


def test_frames_are_kept_without_an_output(video: Video) -> None:
    assert video.path is None
    assert video.frames is not None
    assert video.frames.shape == (video.num_frames, video.height, video.width, 3)
    assert video.frames.dtype == np.uint8
    assert set(video.timings) == set(video.memory) == set(STAGES)


def test_same_request_same_bytes(pipe: Pipeline, video: Video) -> None:
    again = Pipeline.from_pretrained("shapes")(PROMPT, seed=1, steps=3)
    other = pipe(PROMPT, seed=2, steps=3)
    assert np.array_equal(again.frames, video.frames)
    assert not np.array_equal(other.frames, video.frames)


def test_sequential_guidance_gives_the_same_video(pipe: Pipeline, video: Video) -> None:
    sequential = pipe(PROMPT, seed=1, steps=3, sequential_guidance=True)
    difference = np.abs(sequential.frames.astype(int) - video.frames.astype(int))
    assert difference.max() <= 1


def test_guidance_and_prompt_matter(pipe: Pipeline, video: Video) -> None:
    assert not np.array_equal(pipe(PROMPT, seed=1, steps=3, guidance=1).frames, video.frames)
    assert not np.array_equal(pipe("a blue square", seed=1, steps=3).frames, video.frames)


@pytest.mark.parametrize("score", [{"aesthetic": 6.5}, {"motion": 3}, {"camera": "pan left"}])
def test_scores_reach_the_text(pipe: Pipeline, video: Video, score: dict[str, float | str]) -> None:
    assert not np.array_equal(pipe(PROMPT, seed=1, steps=3, **score).frames, video.frames)


def test_events_come_in_order(pipe: Pipeline) -> None:
    events = events_of(pipe, seed=1)
    assert [e.stage for e in events if isinstance(e, StageStarted)] == list(STAGES)
    assert [e.stage for e in events if isinstance(e, StageFinished)] == list(STAGES)
    assert [e.step for e in events if isinstance(e, StepFinished)] == [0, 1]
    assert isinstance(events[-1], Finished)
    decoded = [e for e in events if isinstance(e, StageProgress) and e.stage == "decode"]
    assert decoded[-1].done == decoded[-1].total


def test_each_network_is_gone_before_the_next_stage(pipe: Pipeline) -> None:
    """Between stages no more is alive than the text or the latents: far less than any network."""
    model = pipe.model
    transformer = (model.transformer / "model.safetensors").stat().st_size
    mx.clear_cache()
    idle = mx.get_active_memory()
    alive = {}
    used = {}
    for event in pipe.stream(GenerationRequest(PROMPT, seed=1, steps=2)):
        if isinstance(event, StageStarted):
            alive[event.stage] = mx.get_active_memory() - idle
        if isinstance(event, StepFinished):
            used["denoise"] = mx.get_active_memory() - idle
    assert used["denoise"] > transformer
    assert alive["denoise"] < 200_000 < transformer
    assert alive["decode"] < 200_000
    assert mx.get_active_memory() - idle < 200_000


@pytest.mark.parametrize("frames", [1, 17, 20, 34, 51])
def test_lengths(pipe: Pipeline, frames: int) -> None:
    made = pipe(PROMPT, seed=1, steps=1, num_frames=frames)
    assert made.frames is not None
    assert len(made.frames) == frames


def test_sizes_are_reported_as_decoded(pipe: Pipeline) -> None:
    made = pipe(PROMPT, seed=1, steps=1, num_frames=1, width=52, height=40)
    assert (made.width, made.height) == (48, 40)
    assert any("48x40" in warning for warning in made.warnings)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp", "f_%03d.png"])
def test_the_file_replays_its_own_run(pipe: Pipeline, tmp_path: Path, name: str) -> None:
    first = pipe(PROMPT, seed=4, steps=2, output=tmp_path / name, metadata=True)
    assert first.path == tmp_path / name
    file = tmp_path / name.replace("%03d", "000")
    for source in (
        file,
        tmp_path / (name.split(".", maxsplit=1)[0].removesuffix("_%03d") + ".json"),
    ):
        again = pipe(**replay_options(read_metadata(source)) | {"model": None})
        assert np.array_equal(again.frames, pipe(PROMPT, seed=4, steps=2).frames)


def test_no_metadata_when_not_wanted(pipe: Pipeline, tmp_path: Path) -> None:
    pipe(PROMPT, steps=1, output=tmp_path / "a.mp4", embed_metadata=False)
    with pytest.raises(UsageError):
        read_metadata(tmp_path / "a.mp4")
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_one_frame_becomes_a_picture(pipe: Pipeline, tmp_path: Path) -> None:
    made = pipe(PROMPT, steps=1, num_frames=1, output=tmp_path / "still")
    assert made.path == tmp_path / "still.png"


def test_a_long_prompt_is_cut_with_a_warning(pipe: Pipeline) -> None:
    made = pipe(PROMPT + " and so on" * 200, seed=1, steps=1, num_frames=1)
    assert any("were cut" in warning for warning in made.warnings)
    assert made.metadata["warnings"] == list(made.warnings)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "  "},
        {"prompt": PROMPT + '{"reference_path": "a.png", "mask_strategy": "0"}'},
        {"prompt": PROMPT + "{"},
        {"num_frames": 9},
        {"num_frames": 0},
        {"width": 64},
        {"width": 8, "height": 8},
        {"resolution": "9p"},
        {"aspect_ratio": "1:7"},
        {"steps": 0},
        {"sampler": "magic"},
        {"fps": -1},
        {"dtype": "half"},
        {"vae_dtype": "auto"},
        {"no_such_option": 1},
        {"model": "no/such/model"},
        {"output": f"{__file__}/a.mp4"},
        {"output": "a.avi"},
    ],
    ids=str,
)
def test_bad_requests_fail_before_any_work(pipe: Pipeline, options: dict[str, object]) -> None:
    with pytest.raises((UsageError, WeightsError)) as error:
        pipe(**{"prompt": PROMPT, **options})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_another_model_is_refused(pipe: Pipeline, copy_of_model: Path) -> None:
    with pytest.raises(UsageError, match="asks for"):
        pipe(PROMPT, model=str(copy_of_model))


@pytest.mark.parametrize("stage", STAGES)
def test_stopping_to_listen_leaves_nothing(pipe: Pipeline, tmp_path: Path, stage: str) -> None:
    request = GenerationRequest(PROMPT, steps=2, output=str(tmp_path / "a.mp4"))
    events = pipe.stream(request)
    for event in events:
        if isinstance(event, StageStarted | StageProgress) and event.stage == stage:
            events.close()
            break
    assert list(tmp_path.iterdir()) == []


def test_existing_output_survives_refusal_and_failure(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a.mp4"
    output.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists"):
        pipe(PROMPT, steps=1, output=output)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_sora.pipeline.stages.to_uint8", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, steps=1, output=output, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert output.read_bytes() == b"precious"


def damage(file: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    weights = dict(mx.load(str(file)))  # type: ignore[arg-type]
    mx.eval(weights)
    change(weights)  # type: ignore[arg-type]
    mx.save_safetensors(str(file), weights)  # type: ignore[arg-type]


def test_nan_stops_the_run_and_names_the_step(copy_of_model: Path) -> None:
    def poison(weights: dict[str, mx.array]) -> None:
        weights["x_embedder.proj.bias"] = weights["x_embedder.proj.bias"] * float("nan")

    damage(copy_of_model / "transformer" / "model.safetensors", poison)
    with pytest.raises(NumericsError, match="step 1"):
        Pipeline.from_pretrained(copy_of_model)(PROMPT, steps=3)


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_truncated_weights_name_the_file(copy_of_model: Path, part: str, tmp_path: Path) -> None:
    file = max((copy_of_model / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=file.name):
        Pipeline.from_pretrained(copy_of_model)(PROMPT, steps=1, output=tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()


def test_missing_parts_are_named_before_any_work(copy_of_model: Path) -> None:
    (copy_of_model / "tokenizer" / "spiece.model").unlink()
    with pytest.raises(WeightsError, match="spiece"):
        Pipeline.from_pretrained(copy_of_model)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (f"|0|{PROMPT}|1|a blue square", "only the first"),
        ("https://example.com", "Nothing is left"),
    ],
)
def test_what_a_prompt_loses_is_said(pipe: Pipeline, prompt: str, says: str) -> None:
    made = pipe(prompt, seed=1, steps=1, num_frames=1)
    assert any(says in warning for warning in made.warnings)


def test_the_text_that_was_encoded_is_recorded(pipe: Pipeline) -> None:
    made = pipe("A <b>Red</b> Circle", steps=1, num_frames=1, aesthetic=6.5)
    assert made.metadata["settings"]["text"] == "a red circle aesthetic score: 6.5."


def test_warnings_are_events_too(pipe: Pipeline) -> None:
    warned = [
        e for e in events_of(pipe, num_frames=1, width=52, height=40) if isinstance(e, Warned)
    ]
    assert len(warned) == 2


def test_info_counts_what_is_on_disk(pipe: Pipeline) -> None:
    info = pipe.info()
    files = list(pipe.model.path.rglob("*.safetensors"))
    assert 0 < sum(file.stat().st_size for file in files) - info["bytes"] < 500_000
    assert info["parameters"] == sum(part["parameters"] for part in info["parts"].values())
