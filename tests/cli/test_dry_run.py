"""`--dry-run`: seconds on a measured machine, and plans of a model that is not downloaded."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.manage.machine_file import machine_identity, write_speeds
from mlx_sora.pipeline import engine
from mlx_sora.runtime.progress import format_duration
from tests.helpers.speeds import SPEEDS

WORDS = ["generate", "-p", "a cat", "--dry-run"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of this test alone; the working folder too, in which nothing may appear."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("MLX_SORA_CACHE", str(tmp_path))
    return tmp_path


def measure() -> None:
    write_speeds(replace(SPEEDS, machine=machine_identity()))


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SORA_WEIGHTS", str(tmp_path / "weights"))


def test_without_a_machine_file_one_line_says_how_to_get_seconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*WORDS, "--model", "shapes"]) == 0
    out, err = capsys.readouterr()
    assert "estimated" not in out
    assert "python -m mlx_sora doctor --machine" in err


def test_a_refused_plan_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--model", "shapes", "--memory-budget", "AUTO"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: 'AUTO' is not an amount of memory. Write it as 3.3GB or 800MB, or auto, or off."
    ]


def test_seconds_follow_from_the_machine_file(capsys: pytest.CaptureFixture[str]) -> None:
    measure()
    assert main([*WORDS, "--model", "shapes"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"estimated on this machine: [\d.]+ s \(encode .*denoise .*decode", out)
    assert "doctor" not in err


def test_json_has_seconds_beside_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--model", "shapes", "--json-events"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["seconds"] is plan["total_seconds"] is None
    measure()
    assert main(words) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(measured) == set(plan)
    assert set(measured["seconds"]) == {"encode", "denoise", "decode"}
    assert measured["total_seconds"] == pytest.approx(sum(measured["seconds"].values()), abs=0.01)


@pytest.mark.usefixtures("no_weights")
def test_a_model_that_is_not_downloaded_is_planned(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure()
    assert main([*WORDS, "--model", "opensora-1.2"]) == 0
    out, err = capsys.readouterr()
    assert "opensora-1.2 is not downloaded" in err
    assert "python -m mlx_sora download opensora-1.2" in err
    assert "estimated on this machine: " in out
    assert not any((cache / "work").iterdir())


@pytest.mark.usefixtures("no_weights")
def test_a_model_that_is_not_downloaded_makes_no_video(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS[:-1], "--model", "opensora-1.2"]) == 4
    assert "python -m mlx_sora download opensora-1.2" in capsys.readouterr().err
    assert main([*WORDS, "--model", "elsewhere"]) == 4


def test_a_stale_machine_file_is_one_line_and_no_seconds(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure()
    path = cache / "machine.json"
    path.write_text(path.read_text()[:100])
    assert main([*WORDS, "--model", "shapes"]) == 0
    out, err = capsys.readouterr()
    assert "estimated" not in out
    assert "is ignored" in err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (50.4, "50 s"), (125, "2 min"), (7200, "2.0 h")],
)
def test_durations_have_few_digits(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_reading_all_weights_for_checkpoints_is_foreseen(
    no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    measure()
    words = [*WORDS, "--model", "opensora-1.2"]
    assert main(words) == 0
    assert "weights once" not in capsys.readouterr().err
    assert main([*words, "--checkpoint-every", "5"]) == 0
    seconds = r"first reads 2[\d.]+ GB of weights once, in about [\d.]+ (s|min), to recognise them"
    assert re.search(seconds, capsys.readouterr().err)


def test_reading_all_weights_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "SHOWN_BYTES", 1)
    words = "generate -p a --steps 1 --num-frames 1 --width 32 --height 32 --model shapes -o a.png"
    assert main([*words.split(), "--json-events", "--checkpoint-every", "1"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    hashing = [event for event in events if event.get("stage") == "hash"]
    assert {"stage_started", "stage_progress", "stage_finished"} == {e["event"] for e in hashing}
    assert events.index(hashing[-1]) < [e.get("stage") for e in events].index("encode")
