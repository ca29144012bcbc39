"""Several requests in a row: one visit of T5, failures apart, the same videos as alone."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.runtime.events import (
    Event,
    Finished,
    RequestFailed,
    RequestStarted,
    StageProgress,
    StageStarted,
)

SHORT = {"seed": 1, "steps": 1, "num_frames": 1}
PROMPTS = ("a red circle on a black background", "a blue square on a white background")


def request(prompt: str, **options: object) -> GenerationRequest:
    return GenerationRequest.from_dict({"prompt": prompt, **SHORT, **options})


def events(pipe: Pipeline, *requests: GenerationRequest) -> list[Event]:
    return list(pipe.stream_all(requests))


def test_all_text_is_encoded_before_the_first_video(pipe: Pipeline) -> None:
    one, two = PROMPTS
    seen = events(pipe, request(one), request(two, negative_prompt=one), request(one, seed=2))
    stages = [e.stage for e in seen if isinstance(e, StageStarted)]
    assert stages == ["encode", *["denoise", "decode"] * 3]
    encoded = [e for e in seen if isinstance(e, StageProgress) and e.stage == "encode"]
    assert encoded[-1].total == 2  # each text once
    videos = [e.video for e in seen if isinstance(e, Finished)]
    assert [e.index for e in seen if isinstance(e, RequestStarted)] == [0, 1, 2]
    assert np.array_equal(videos[0].frames, pipe(one, **SHORT).frames)
    assert all(video.timings["encode"] > 0 for video in videos)


def test_other_limits_are_another_visit_of_t5(pipe: Pipeline) -> None:
    one = PROMPTS[0]
    seen = events(pipe, request(one, memory_budget="2GB"), request(one, ci_dl=True), request(one))
    stages = [e.stage for e in seen if isinstance(e, StageStarted)]
    assert stages == [*["encode"] * 3, *["denoise", "decode"] * 3]
    videos = [e.video for e in seen if isinstance(e, Finished)]
    assert np.array_equal(videos[1].frames, videos[2].frames)
    assert videos[0].metadata["settings"]["memory_budget"] == 2 * 10**9


def test_one_failure_leaves_the_others_alone(pipe: Pipeline, tmp_path: Path) -> None:
    one, two = PROMPTS
    same = str(tmp_path / "a.png")
    seen = events(
        pipe,
        request(" "),
        request(one, output=same),
        request(two, output=same),
        request(two, images="none.png"),
        request(two, output=str(tmp_path / "b.png")),
    )
    failed = {e.index: e.error for e in seen if isinstance(e, RequestFailed)}
    assert sorted(failed) == [0, 2, 3]
    assert all(isinstance(error, UsageError) for error in failed.values())
    assert "one file" in failed[2].message
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_failure_at_work_is_a_line_and_holds_no_memory(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def broken(*args: object, **more: object) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("no\nmore")
        raise WeightsError("bad weights.", "Get others.")

    mx.clear_cache()
    idle = mx.get_active_memory()
    monkeypatch.setattr("mlx_sora.runtime.health.Health.check_latents", broken)
    seen = events(pipe, *map(request, PROMPTS))
    calls.clear()
    errors = [e.error for e in seen if isinstance(e, RequestFailed)]
    assert str(errors[0]) == "RuntimeError: no more"
    assert [error.exit_code for error in errors] == [1, 4]
    assert all(error.__traceback__ is None for error in errors)
    assert mx.get_active_memory() - idle < 200_000


def test_stopping_to_listen_ends_the_batch(pipe: Pipeline, tmp_path: Path) -> None:
    stream = pipe.stream_all([request(p, output=str(tmp_path / f"{p}.png")) for p in PROMPTS])
    for event in stream:
        if isinstance(event, StageStarted) and event.stage == "denoise":
            stream.close()
            break
    assert list(tmp_path.iterdir()) == []
