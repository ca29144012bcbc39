"""`info`: readable for people, JSON for programs."""

from __future__ import annotations

import json

import pytest

from mlx_sora.cli.info import lines
from mlx_sora.cli.main import main
from mlx_sora.cli.progress import human_bytes
from tests.helpers.fake_pipeline import FakePipeline


def test_text(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "model: fake",
        "transformer:",
        "  parameters: 1,234,567",
        "  bytes: 2 MB",
        "device:",
        "  total memory: 8.00 GB",
        "  metal: False",
    ]


def test_environment_variables_keep_their_names() -> None:
    facts = {"mlx_switches": {"MLX_ENABLE_TF32": "0"}}
    assert list(lines(facts)) == ["mlx switches:", "  MLX_ENABLE_TF32: 0"]


def test_json(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", "--model", "shapes", "--dtype", "float32"]) == 0
    assert json.loads(capsys.readouterr().out) == pipeline.info()
    assert pipeline.loaded == [("shapes", "float32")]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "2 kB"), (12_300_000, "12 MB"), (9.5e9, "9.50 GB")],
)
def test_bytes(number: float, text: str) -> None:
    assert human_bytes(number) == text


def test_a_name_too_long_for_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "a" * 300]) == 2
    error = capsys.readouterr().err
    assert "--model must be a path whose names have up to 255 bytes" in error
    assert "OSError" not in error


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["generate"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--help"])
        expected = capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            main(["help", *words])
        assert ended.value.code in (0, None)
        assert capsys.readouterr().out == expected
