"""Where sources of an option disagree, the message names it and where its value comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.errors import MlxSoraError
from mlx_sora.video.metadata import read_metadata

PROMPT = "a red circle moving right on a black background"
WORDS = ["generate", "-p", PROMPT, "--model", "shapes", "--dry-run"]


def error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the error of a command."""
    capsys.readouterr()
    assert main([*words]) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


def test_an_option_of_a_record_is_named_as_such(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"request": {"prompt": "a", "condition_frames": 34, "loop": 2}, "settings": {}}
    (folder / "r.json").write_text(json.dumps(record))
    found = error(capsys, *WORDS, "-C", "r.json", "--num-frames", "34")
    assert found == (
        "Clips of --num-frames 34 that share --condition-frames 34 add nothing "
        "(--condition-frames is from r.json). Give --num-frames 51, or --condition-frames 17."
    )
    (folder / "r.json").write_text('{"request": {"prompt": "a", "steps": 0}, "settings": {}}')
    assert "--steps 0 is out of range (--steps is from r.json)." in error(
        capsys, *WORDS, "-C", "r.json"
    )


def test_an_option_of_a_preset_is_named_as_such(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--preset", "balanced", "--steps", "4"]) == 0
    saves_nothing = "warning: --step-cache every:4,warmup=6,order=1 saves nothing in 4 steps"
    found = capsys.readouterr().err.splitlines()
    assert f"{saves_nothing} (--step-cache is from --preset balanced)." in found
    assert not list(folder.iterdir())


def test_a_checkpoint_fixes_values_that_the_command_may_repeat(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise MlxSoraError("stopped")

    words = ["generate", "-p", PROMPT, "--model", "shapes", "--steps", "2", "--num-frames", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("mlx_sora.pipeline.generate.decode", stop)
        assert main([*words, "--seed", "3", "-o", "a.png", "--checkpoint-every", "1"]) == 1
    resume = ["generate", "--resume", "a.png.checkpoint.safetensors"]
    assert error(capsys, *resume, "--seed", "3", "--steps", "4") == (
        "--steps cannot be changed with --resume: it is 2 in a.png.checkpoint.safetensors, 4 in "
        "the command. Leave --steps out."
    )
    assert main([*resume, "--seed", "3", "--steps", "2", "--quiet"]) == 0
    assert (folder / "a.png").is_file()


def test_scores_in_the_prompt_overrule_flags_with_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "-p", f"{PROMPT}. motion score: 3.", "--model", "shapes", "--motion", "9"]
    assert main([*words, "--steps", "1", "--num-frames", "1", "-o", "a.png"]) == 0
    line = "--motion 9.0 is not used: the prompt has its own 'motion score:'."
    assert f"warning: {line}" in capsys.readouterr().err.splitlines()
    assert read_metadata(folder / "a.png")["warnings"] == [line]
