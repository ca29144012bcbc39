"""Accelerations: techniques from configs, composed as one."""

from __future__ import annotations

from dataclasses import replace
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.accel.tdtm import PairedFrames
from mlx_sora.models.hooks import NoMerging, ResidentBlocks
from mlx_sora.request.generation import options, technique_names
from mlx_sora.request.techniques import OFF, TechniqueConfig
from mlx_sora.sampling.guidance import CFGSlice
from tests.helpers.techniques import make_accelerations

SCHEDULE = ScheduleInfo(
    steps=6, evaluations=1, frames=5, times=(1000.0, 900.0, 800.0, 600.0, 400.0, 200.0)
)
WHOLE = CFGSlice(0, 2)


@pytest.mark.parametrize("name", technique_names())
def test_technique_names_have_configs(name: str) -> None:
    config = options()[name].parse(OFF)
    assert isinstance(config, TechniqueConfig)
    assert (config.mode, str(config), options()[name].default) == (OFF, OFF, None)
    assert callable(resolve_name(config.ACCELERATION))


@pytest.mark.parametrize("modes", [{}, dict.fromkeys(technique_names(), OFF)], ids=["unsaid", OFF])
def test_off_changes_nothing(modes: dict[str, str]) -> None:
    parts = make_accelerations(modes, SCHEDULE)
    assert parts.policy is None
    assert (parts.guidance, parts.block_cache(0, WHOLE), parts.cached_residuals) == (None, None, 0)
    assert parts.skipped_steps == parts.cond_only_steps == frozenset()
    context = parts.hooks(0)
    assert context.block_cache is None
    assert isinstance(context.token_merging, NoMerging)
    assert context.blocks is None
    assert (parts.record(), parts.summaries(), parts.warnings) == ({}, [], [])


def test_techniques_fill_only_their_own_hooks() -> None:
    leaping = make_accelerations({"lpl": "fixed:2"}, SCHEDULE)
    assert leaping.policy is not None
    assert isinstance(leaping.hooks(0).token_merging, NoMerging)
    merging = make_accelerations({"tdtm": "2"}, SCHEDULE)
    assert merging.policy is None
    kinds = [type(merging.hooks(i).token_merging) for i in range(4)]
    assert kinds == [PairedFrames, PairedFrames, NoMerging, NoMerging]

    caching = make_accelerations({"step_cache": "every:2,warmup=1"}, SCHEDULE)
    assert caching.block_cache(0, WHOLE) is not None
    assert caching.guidance is None
    assert (caching.skipped_steps, caching.cached_residuals) == ({1, 3, 5}, 1)
    interval = make_accelerations({"guidance_interval": "300,900"}, SCHEDULE)
    assert interval.block_cache(0, WHOLE) is None
    assert interval.guidance is not None
    assert interval.cond_only_steps == {0, 5}


def test_guidance_cache_knows_steps_without_blocks_or_guidance() -> None:
    """The uncond prediction needs a step with guidance whose blocks run."""
    alone = {"guidance_cache": "every:2,after=0"}
    assert make_accelerations(alone, SCHEDULE).cond_only_steps == {1, 3, 5}
    cached = make_accelerations(alone | {"step_cache": "every:3,warmup=1"}, SCHEDULE)
    assert cached.skipped_steps == {1, 2, 4, 5}
    assert cached.cond_only_steps == {1, 2, 4, 5}
    within = make_accelerations(alone | {"guidance_interval": "300,900"}, SCHEDULE)
    assert within.cond_only_steps == {0, 5} | {2, 4}


def test_guidance_techniques_warn_without_guidance() -> None:
    modes = {"guidance_interval": "300,900", "guidance_cache": "every:2"}
    parts = make_accelerations(modes, replace(SCHEDULE, guided=False))
    assert parts.cond_only_steps == frozenset()
    assert [line.split()[0] for line in parts.warnings] == [
        "--guidance-interval",
        "--guidance-cache",
    ]
    parts.on_step_end(SimpleNamespace(step=SimpleNamespace(index=0)))  # type: ignore[arg-type]
    assert parts.record()["guidance_interval"] == {"guided_steps": 0, "steps": 1}


def test_records_and_warnings_are_in_order() -> None:
    modes = {"tdtm": "9", "lpl": "fixed:5", "step_cache": "every:9,warmup=9"}
    parts = make_accelerations(
        modes | {"guidance_interval": "0,1", "guidance_cache": "every:1"}, SCHEDULE
    )
    assert [warning.split()[0] for warning in parts.warnings] == [
        "--lpl",
        "--tdtm",
        "--step-cache",
        "--guidance-interval",
        "--guidance-cache",
    ]
    for index in range(6):
        step = SimpleNamespace(index=index)
        result: Any = SimpleNamespace(step=step, is_leap=index == 5, t=100.0)
        parts.on_step_end(result)
    assert list(parts.record()) == technique_names()
    assert parts.record()["lpl"]["after_steps"] == 5
    assert parts.record()["tdtm"]["merged_steps"] == 6
    assert [line.split(":")[0] for line in parts.summaries()] == technique_names()


def test_hooks_pass_the_block_provider_on() -> None:
    blocks = ResidentBlocks[Any]([])
    for modes in ({}, {"tdtm": "all"}):
        assert make_accelerations(modes, SCHEDULE).hooks(0, blocks).blocks is blocks
