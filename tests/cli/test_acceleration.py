"""Accelerations on the command line: usage errors and notes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.cli.progress import BarRenderer, JsonRenderer, QuietRenderer
from mlx_sora.runtime.events import Noted
from tests.helpers.fake_pipeline import FakePipeline


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "--lpl fixe:3",
            "off, fixed:STEPS[,order=0], t:TIME[,order=0], adaptive[:patience=3,",
        ),
        ("--lpl fixed", "fixed:STEPS"),
        ("--lpl t:1001", "a number from 0 to 1000 as TIME"),
        ("--lpl adaptive:minimum=2", "a number from 0 to 1 as minimum"),
        ("--lpl adaptive:tolerence=2", "tolerance=0.0001"),
        ("--tdtm most", "off, all[:sites="),
        ("--tdtm -1", "--tdtm"),
        ("--step-cache every", "every:EACH[,warmup=6,order=0]"),
        ("--step-cache every:3,order=2", "a whole number from 0 to 1 as order"),
        ("--step-cache table:8,fil=x", "table:COMPUTED[,order=0,file=FILE]"),
        ("--guidance-cache 5", "every:EACH[,after=0.333,boost=1]"),
        ("--guidance-interval 200", "off or LOW,HIGH"),
        ("--preset slow", "'exact', 'balanced', 'fast', 'tiny-ram'"),
    ],
)
def test_bad_modes_show_the_valid_ones(
    folder: Path,
    pipeline: FakePipeline,
    capsys: pytest.CaptureFixture[str],
    words: str,
    says: str,
) -> None:
    assert main(["generate", "-p", "a", *words.split()]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    assert says in message
    assert pipeline.requests == []
    assert list(folder.iterdir()) == []


def test_notes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    event = Noted("lpl: leapt")
    BarRenderer().handle(event)
    JsonRenderer().handle(event)
    QuietRenderer().handle(event)
    captured = capsys.readouterr()
    assert captured.err == "lpl: leapt\n"
    assert json.loads(captured.out) == {"event": "noted", "message": "lpl: leapt"}
