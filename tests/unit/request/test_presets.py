"""Presets fill what a request leaves open, and nothing else."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.cli.flags import build_requests
from mlx_sora.errors import UsageError
from mlx_sora.request.generation import options, preset_values, technique_names
from mlx_sora.request.presets import PRESETS
from mlx_sora.request.techniques import OFF

SMALL = {"prompt": "a red circle", "seed": 3, "steps": 4, "width": 32, "height": 32}


def test_presets_are_these() -> None:
    assert list(PRESETS) == ["exact", "balanced", "fast", "tiny-ram"]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_decides_every_technique(name: str) -> None:
    values = preset_values(name)
    assert set(technique_names()) <= set(values) <= {f.name for f in fields(GenerationRequest)}
    request = GenerationRequest("a", preset=name).with_preset()
    assert {key: getattr(request, key) for key in values} == {
        key: options()[key].parse(value) if key in technique_names() else value
        for key, value in values.items()
    }
    approximate = {key for key in technique_names() if values[key] != OFF}
    assert bool(approximate) == (name in ("balanced", "fast"))
    # Nothing of one model and size only: a preset is for all of them.
    assert not any(str(value).startswith("table") for value in values.values())


@pytest.mark.parametrize("name", PRESETS)
def test_preset_keeps_given_options(name: str) -> None:
    given = dict.fromkeys(technique_names(), OFF) | {"lpl": "fixed:2"}
    request = GenerationRequest("a", preset=name, **given).with_preset()  # type: ignore[arg-type]
    assert {key: getattr(request, key) for key in given} == given


def test_request_without_preset_stays_the_same() -> None:
    request = GenerationRequest("a")
    assert request.with_preset() is request


def test_unknown_preset_lists_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="Valid: exact, balanced, fast, tiny-ram"):
        GenerationRequest("a", preset="slow")


def test_preset_is_recorded_with_its_options() -> None:
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


def test_new_preset_replaces_the_options_of_a_recorded_one() -> None:
    recorded = GenerationRequest("a", seed=1, preset="fast", motion=3).with_preset().to_dict()
    replayed = build_requests({}, recorded)[0]
    assert replayed == GenerationRequest("a", seed=1, preset="fast", motion=3).with_preset()
    exact = build_requests({"preset": "exact"}, recorded)[0].with_preset()
    assert exact.preset == "exact"
    assert exact.motion == 3
    assert all(getattr(exact, name) == OFF for name in technique_names())
    mixed = build_requests({"preset": "exact", "lpl": "fixed:3"}, recorded)[0]
    assert mixed.with_preset().lpl == "fixed:3"
