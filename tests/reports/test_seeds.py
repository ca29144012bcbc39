"""Seeds out of range are answered by what to do (bghira/SimpleTuner #97: -1 for a random one)."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.cli.requests import read_prompt_file
from mlx_sora.errors import UsageError
from mlx_sora.pipeline import Pipeline

ADVICE = "Give 0 to 9223372036854775807, or leave it out for a random one."
WRONG = (-1, -(2**63), 2**63, 2**64, 10**40)


@pytest.mark.parametrize("seed", WRONG)
def test_the_command_line(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "red", "--seed", str(seed)]) == UsageError.exit_code
    said = capsys.readouterr().err
    assert ADVICE in said
    assert str(seed)[:40] in said


@pytest.mark.parametrize("seed", WRONG)
def test_python(pipe: Pipeline, seed: int) -> None:
    with pytest.raises(UsageError, match=ADVICE):
        pipe("red", seed=seed, steps=1, num_frames=1)


@pytest.mark.parametrize("seed", WRONG)
def test_a_line_of_a_prompt_file(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text(f'{{"prompt": "red", "seed": {seed}}}\n')
    failure = read_prompt_file(str(path), {}, None).failures[1]
    assert ADVICE in str(failure)


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_the_whole_range_works(pipe: Pipeline, seed: int) -> None:
    assert pipe("red", seed=seed, steps=1, num_frames=1, width=64, height=64).seed == seed
