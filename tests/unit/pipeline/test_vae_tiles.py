"""`vae_tiles` as an option: what it does to the video and the record, plans, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_sora import GenerationRequest, MemoryBudgetError, Pipeline, UsageError, Video
from mlx_sora.cli.main import main
from mlx_sora.memory.estimate import published_sizes
from mlx_sora.video.metadata import read_metadata

PROMPT = "a red circle moving right on a black background"
SMALL = {"prompt": PROMPT, "seed": 1, "steps": 2, "num_frames": 17}


def made(pipe: Pipeline, **more: object) -> Video:
    return pipe(**{**SMALL, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(pipe: Pipeline) -> np.ndarray:
    return frames(made(pipe))


def frames(video: Video) -> np.ndarray:
    assert video.frames is not None
    return video.frames.astype(int)


def test_off_by_default_and_one_tile_is_the_whole(pipe: Pipeline, whole: np.ndarray) -> None:
    video = made(pipe, vae_tiles=1)
    assert np.array_equal(frames(video), whole)
    assert video.metadata["settings"]["vae_tiles"] == 1


def test_tiles_are_close_recorded_and_the_same_within_a_budget(
    pipe: Pipeline, whole: np.ndarray, tmp_path: Path
) -> None:
    video = made(pipe, vae_tiles=2)
    difference = np.abs(frames(video) - whole)
    assert 0 < difference.mean() < 20
    tight = made(pipe, vae_tiles=2, memory_budget="1GB")  # decoders in turn, fewer frames at once
    assert np.abs(frames(tight) - frames(video)).max() <= 1
    made(pipe, vae_tiles=2, output=str(tmp_path / "a.mp4"))
    record = read_metadata(tmp_path / "a.mp4")
    assert record["request"]["vae_tiles"] == record["settings"]["vae_tiles"] == 2


@pytest.mark.parametrize("count", [0, 5, -1, "two", 1.5])
def test_counts_that_make_no_sense(count: object) -> None:
    with pytest.raises(UsageError, match=r"vae_tiles must be 1 to 4 tiles|whole number"):
        GenerationRequest(PROMPT, vae_tiles=count)  # type: ignore[arg-type]


def test_pictures_too_small_for_tiles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["generate", "-p", PROMPT, "--model", "shapes", "--vae-tiles", "3"]
    assert main([*words, "--width", "64", "--height", "40"]) == 2
    assert "64x40 pixels are too few for --vae-tiles 3" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def large(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The pipeline, to be asked for plans only, as if its model were Open-Sora 1.2."""
    monkeypatch.setattr("mlx_sora.pipeline.engine.model_sizes", lambda *_, **__: published_sizes(4))
    return Pipeline(pipe.model)


def request_of(**more: object) -> GenerationRequest:
    options = {"prompt": PROMPT, "seed": 1, "resolution": "720p", "num_frames": 1}
    return GenerationRequest.from_dict({**options, **more})


def test_tiles_need_less_memory_where_it_is_scarce(large: Pipeline) -> None:
    plans = [large.plan(request_of(vae_tiles=n)) for n in (1, 2, 3, 4)]
    needs = [plan.smallest for plan in plans]
    assert needs == sorted(needs, reverse=True)
    assert needs[1] < needs[0] / 2
    work = [plan.stage("decode").flops for plan in plans]
    assert work[0] < work[1] < 2 * work[0]


def refusal(pipe: Pipeline, ways: dict[str, object], **more: object) -> str:
    """Return the advice of a refusal within the smallest budget that `ways` need."""
    least = str(pipe.plan(request_of(**more, **ways)).smallest)
    assert pipe.plan(request_of(**more, **ways, memory_budget=least)).peak <= int(least)
    with pytest.raises(MemoryBudgetError) as error:
        pipe.plan(request_of(**more, memory_budget=least))
    return error.value.fix


def test_a_refusal_names_tiles_where_they_would_do_and_never_takes_them(large: Pipeline) -> None:
    assert "or vae_tiles=2," in refusal(large, {"vae_tiles": 2})
    # Where guidance in two passes does alone, nothing approximate is named.
    advice = refusal(large, {"sequential_guidance": True}, resolution="480p", num_frames=204)
    assert "vae_tiles" not in advice
    assert "sequential_guidance=True" in advice
    advice = refusal(large, {"sequential_guidance": True, "vae_tiles": 2}, num_frames=51)
    assert "or sequential_guidance=True, vae_tiles=2," in advice
