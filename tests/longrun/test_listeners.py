"""Listeners that fail after every single event of a run: nothing of it stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_sora import Pipeline
from mlx_sora.runtime.events import (
    Noted,
    PreviewReady,
    RunPlanned,
    StageFinished,
    StageProgress,
    StageStarted,
    StepFinished,
)
from tests.longrun.table import Fault
from tests.unit.pipeline.test_locks import asked, stopped


@pytest.mark.parametrize("way", ["throw", "close"])
@pytest.mark.parametrize("memory", [{}, {"memory_budget": "2GB"}], ids=["resident", "streamed"])
def test_after_every_event(
    tmp_path: Path, fault: Fault, way: str, memory: dict[str, object]
) -> None:
    pipe = Pipeline.from_pretrained("shapes")
    request = asked(num_frames=17, preview_every=1, **memory)
    whole = pipe.stream(request)
    count = sum(1 for _ in whole)
    ends = []
    for n in range(1, count):
        folder = tmp_path / str(n)
        folder.mkdir()
        ends.append(stopped(pipe, replace(request, output=str(folder / "a.webp")), n, way)[-1])
    kinds = (
        RunPlanned,
        Noted,
        StageStarted,
        StageProgress,
        StepFinished,
        PreviewReady,
        StageFinished,
    )
    assert {type(event) for event in ends} == set(kinds)
    done = "fails" if way == "throw" else "closes the run"
    where = "all, streamed" if memory else "all, resident"
    result = "no file, thread or limit left"
    fault(f"a listener {done} after event n", where, len(ends), 0, result)
