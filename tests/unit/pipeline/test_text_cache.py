"""Runs whose text was encoded before: no T5, the same video, and a plan that knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.pipeline.networks import NetworkLoader
from mlx_sora.utils.files import CACHE_VARIABLE

REQUEST = GenerationRequest(
    prompt="a red circle on a white background", seed=1, steps=1, num_frames=1
)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the text cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path / "text"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages for which T5 was opened."""
    found: list[str] = []
    text_encoder = NetworkLoader.text_encoder

    def count(self: NetworkLoader, plan: Any) -> Any:
        found.append(plan.stage)
        return text_encoder(self, plan)

    monkeypatch.setattr(NetworkLoader, "text_encoder", count)
    return found


def run(pipe: Pipeline, **options: Any) -> np.ndarray:
    video = pipe(REQUEST.prompt, **{"seed": 1, "steps": 1, "num_frames": 1, **options})
    assert video.frames is not None
    return video.frames


@pytest.mark.parametrize("options", [{}, {"ci_dl": True}, {"negative_prompt": "blue"}])
def test_the_second_video_reads_no_text_encoder(
    pipe: Pipeline, texts: Path, opened: list[str], options: dict[str, Any]
) -> None:
    first = run(pipe, **options)
    assert opened == ["encode"]
    np.testing.assert_array_equal(run(pipe, **options), first)
    assert opened == ["encode"]
    run(pipe, **options, text_cache=False)
    assert opened == ["encode", "encode"]
    assert len(list(texts.iterdir())) == 1 + ("negative_prompt" in options)


def test_a_batch_encodes_what_is_new(pipe: Pipeline, texts: Path, opened: list[str]) -> None:
    run(pipe)
    requests = [REQUEST, GenerationRequest(prompt="a blue square", seed=1, steps=1, num_frames=1)]
    for _ in range(2):
        list(pipe.stream_all(requests))
    assert opened == ["encode", "encode"]
    assert len(list(texts.iterdir())) == 2


def test_the_plan_reads_nothing_for_a_text_that_is_stored(pipe: Pipeline, texts: Path) -> None:
    before = pipe.plan(REQUEST).stage("encode")
    run(pipe)
    after, other = (
        pipe.plan(request).stage("encode")
        for request in (REQUEST, GenerationRequest(prompt="a blue square", seed=1))
    )
    assert before.read > 0 < before.flops
    assert (after.read, after.flops) == (0, 0)
    assert after.peak == before.peak
    assert (other.read > 0, other.flops > 0) == (True, True)


def test_quantized_weights_have_states_of_their_own(pipe: Pipeline, texts: Path) -> None:
    run(pipe)
    run(pipe, quantize=8)
    assert len(list(texts.iterdir())) == 2


def test_a_cache_that_is_lost_after_planning_is_made_again(
    pipe: Pipeline, texts: Path, opened: list[str]
) -> None:
    run(pipe)
    events = pipe.stream(REQUEST)
    next(events)
    for file in texts.iterdir():
        file.unlink()
    list(events)
    assert opened == ["encode", "encode"]
