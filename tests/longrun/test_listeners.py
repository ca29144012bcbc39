"""Listeners that fail after every single event of a run: nothing is left of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_sora import Pipeline
from mlx_sora.runtime.events import (
    PreviewReady,
    StageFinished,
    StageProgress,
    StageStarted,
    StepFinished,
)
from tests.unit.test_concurrency import asked, stopped


@pytest.mark.parametrize("way", ["throw", "close"])
@pytest.mark.parametrize("memory", [{}, {"memory_budget": "2GB"}], ids=str)
def test_after_every_event(tmp_path: Path, way: str, memory: dict[str, object]) -> None:
    pipe = Pipeline.from_pretrained("shapes")
    request = asked(output=str(tmp_path / "a.webp"), num_frames=17, preview_every=1, **memory)
    whole = pipe.stream(replace(request, output=None))
    count = sum(1 for _ in whole)
    ends = [stopped(pipe, request, n, way)[-1] for n in range(1, count)]
    kinds = (StageStarted, StageProgress, StepFinished, PreviewReady, StageFinished)
    assert {type(event) for event in ends} == set(kinds)
