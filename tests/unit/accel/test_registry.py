"""The registry: every technique has its field, and a set of techniques works as one."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_sora.accel import ACCELERATIONS, OFF, Accelerations
from mlx_sora.accel.base import Job
from mlx_sora.accel.tdtm import PairedFrames
from mlx_sora.models.context import AllTokens, ResidentBlocks
from mlx_sora.request import GenerationRequest, options
from mlx_sora.sampling.base import AllSteps

JOB = Job(steps=6, evaluations=1, frames=5)


def test_fields_and_techniques_are_the_same() -> None:
    named = [name for name, option in options().items() if option.group == "acceleration"]
    assert named == list(ACCELERATIONS)
    defaults = {field.name: field.default for field in fields(GenerationRequest)}
    for name, (modes, _) in ACCELERATIONS.items():
        assert options()[name].parse is modes
        assert modes(OFF) == OFF
        assert defaults[name] is None


@pytest.mark.parametrize("modes", [{}, dict.fromkeys(ACCELERATIONS, OFF)], ids=["unsaid", OFF])
def test_off_is_plain(modes: dict[str, str]) -> None:
    parts = Accelerations(modes, JOB)
    assert isinstance(parts.policy, AllSteps)
    context = parts.context(0)
    assert isinstance(context.tokens, AllTokens)
    assert context.blocks is None
    assert (parts.record(), parts.summaries(), parts.warnings) == ({}, [], [])


def test_each_fills_its_own_seam() -> None:
    leaping = Accelerations({"lpl": "fixed:2"}, JOB)
    assert not isinstance(leaping.policy, AllSteps)
    assert isinstance(leaping.context(0).tokens, AllTokens)
    merging = Accelerations({"tdtm": "2"}, JOB)
    assert isinstance(merging.policy, AllSteps)
    kinds = [type(merging.context(i).tokens) for i in range(4)]
    assert kinds == [PairedFrames, PairedFrames, AllTokens, AllTokens]


def test_together_they_report_one_by_one() -> None:
    parts = Accelerations({"tdtm": "9", "lpl": "fixed:5"}, JOB)
    assert [warning.split()[0] for warning in parts.warnings] == ["--lpl", "--tdtm"]
    for index in range(6):
        step = SimpleNamespace(index=index)
        result: Any = SimpleNamespace(step=step, leapt=index == 5, t=100.0)
        parts.watch(result)
    assert list(parts.record()) == list(ACCELERATIONS)
    assert parts.record()["lpl"]["after_steps"] == 5
    assert parts.record()["tdtm"]["merged_steps"] == 6
    assert [line.split(":")[0] for line in parts.summaries()] == list(ACCELERATIONS)


def test_blocks_of_another_are_passed_on() -> None:
    blocks = ResidentBlocks[Any]([])
    for modes in ({}, {"tdtm": "all"}):
        assert Accelerations(modes, JOB).context(0, blocks).blocks is blocks
