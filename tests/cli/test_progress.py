"""Progress on a terminal and in a log."""

from __future__ import annotations

import io
import re
import sys

import mlx.core as mx
import pytest

from mlx_sora.cli import progress
from mlx_sora.cli.progress import BarRenderer
from mlx_sora.runtime.events import (
    PlannedStage,
    RunPlanned,
    StageFinished,
    StageStarted,
    StepFinished,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def leap(renderer: BarRenderer) -> None:
    """Show a resumed second clip of three, that leaps after step 6 of 10."""
    renderer.handle(RunPlanned((PlannedStage("denoise", 10, 1.0, done=4, clip=1, clips=3),)))
    renderer.handle(StageStarted("denoise", 10))
    for index in range(4, 6):
        renderer.handle(StepFinished(index, 10, 1.0, 2.0, mx.zeros(1)))
    renderer.handle(StageFinished("denoise", 4.0, 0, 0))


def test_a_bar_has_one_rate_and_ends_at_100_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_REDRAW", 0.0)
    leap(BarRenderer())
    drawn = [line for line in re.split(r"[\r\n]", terminal.getvalue()) if line.strip()]
    assert "denoise clip 2 of 3  40%" in drawn[0]
    assert " 4/10 " in drawn[0]
    assert "100%" in drawn[-1]
    assert "10/10" in drawn[-1]
    assert len(re.findall(r"step/s|s/step|it/s", drawn[-1])) == 1


def test_a_log_has_few_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leap(BarRenderer())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("denoise clip 2 of 3 100% 10/10, ")
    assert lines[0].isprintable()
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_LOG_SHARE", 0.0)
    leap(BarRenderer())
    assert len(capsys.readouterr().err.splitlines()) == 4
