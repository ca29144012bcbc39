"""Presets fill what a request leaves open, and nothing else."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.accel import ACCELERATIONS, OFF
from mlx_sora.cli.flags import build_requests
from mlx_sora.errors import UsageError
from mlx_sora.request.generation import preset_values
from mlx_sora.request.presets import PRESETS

SMALL = {"prompt": "a red circle", "seed": 3, "steps": 4, "width": 32, "height": 32}


def test_there_are_these() -> None:
    assert list(PRESETS) == ["exact", "balanced", "fast", "tiny-ram"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_decides_every_technique(name: str) -> None:
    values = preset_values(name)
    assert set(ACCELERATIONS) <= set(values) <= {f.name for f in fields(GenerationRequest)}
    request = GenerationRequest("a", preset=name).with_preset()
    assert {key: getattr(request, key) for key in values} == {
        key: ACCELERATIONS[key][0](value) if key in ACCELERATIONS else value
        for key, value in values.items()
    }
    approximate = {key for key in ACCELERATIONS if values[key] != OFF}
    assert bool(approximate) == (name in ("balanced", "fast"))
    # Nothing of one model and size only: a preset is for all of them.
    assert not any(str(value).startswith("table") for value in values.values())


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_given_stays(name: str) -> None:
    given = dict.fromkeys(ACCELERATIONS, OFF) | {"lpl": "fixed:2"}
    request = GenerationRequest("a", preset=name, **given).with_preset()  # type: ignore[arg-type]
    assert {key: getattr(request, key) for key in given} == given


def test_without_a_preset_nothing_changes() -> None:
    request = GenerationRequest("a")
    assert request.with_preset() is request


def test_an_unknown_one_is_told_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="Valid: exact, balanced, fast, tiny-ram"):
        GenerationRequest("a", preset="slow")


def test_it_is_recorded_with_what_it_meant() -> None:
    pipe = Pipeline.from_pretrained("shapes")
    request = GenerationRequest.from_dict({**SMALL, "num_frames": 1, "preset": "tiny-ram"})
    assert pipe.plan(request).stage("denoise").resident == 0
    video = pipe(**{**SMALL, "num_frames": 1, "preset": "tiny-ram"})  # type: ignore[arg-type]
    plain = pipe(**{**SMALL, "num_frames": 1})  # type: ignore[arg-type]
    recorded = video.metadata["request"]
    assert recorded["preset"] == "tiny-ram"
    assert recorded["sequential_guidance"] is True
    assert "denoise" in video.metadata["accelerations"]["ci_dl"]
    assert video.frames is not None
    assert plain.frames is not None
    assert abs(video.frames.astype(int) - plain.frames).max() <= 1


def test_another_preset_replaces_what_a_recorded_one_filled_in() -> None:
    recorded = GenerationRequest("a", seed=1, preset="fast", motion=3).with_preset().to_dict()
    replayed = build_requests({}, recorded)[0]
    assert replayed == GenerationRequest("a", seed=1, preset="fast", motion=3).with_preset()
    exact = build_requests({"preset": "exact"}, recorded)[0].with_preset()
    assert exact.preset == "exact"
    assert exact.motion == 3
    assert all(getattr(exact, name) == OFF for name in ACCELERATIONS)
    mixed = build_requests({"preset": "exact", "lpl": "fixed:3"}, recorded)[0]
    assert mixed.with_preset().lpl == "fixed:3"
