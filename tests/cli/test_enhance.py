"""--enhance-prompt: what is drawn, printed, recorded and replayed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mlx_sora import enhance_prompt
from mlx_sora.cli.main import main
from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.loading.model_folder import ModelFolder, bundled_folder
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.text import enhance
from mlx_sora.text.enhance import LONG, MAX_CHARACTERS
from mlx_sora.video.metadata import read_metadata
from tests.helpers.fake_pipeline import FakePipeline
from tests.helpers.language_model import write_language_model

DRAWN = "a red circle moving right on a black background"


def answer(monkeypatch: pytest.MonkeyPatch, text: str, code: int = 0, error: str = "") -> list[Any]:
    """Put a program that answers `text` in the place of mlx-lm; return its calls."""
    calls: list[Any] = []

    def run(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        calls.append((command, more))
        return subprocess.CompletedProcess(command, code, text, error)

    monkeypatch.setattr(enhance, "find_spec", lambda name: name)
    monkeypatch.setattr(enhance.subprocess, "run", run)  # type: ignore[attr-defined]
    return calls


def test_the_template_writes_out_short_prompts_only() -> None:
    found = enhance_prompt(" a cat on a beach. ")
    assert found.startswith("a cat on a beach. The scene")
    long = "word " * (LONG + 1)
    assert enhance_prompt(long) == long
    assert enhance_prompt(DRAWN, guide="shapes") == DRAWN
    scenes = '|0|a cat|2|a dog{"reference_path": "a.png", "mask_strategy": "0"}'
    found = enhance_prompt(scenes)
    assert found.startswith("|0|a cat. The scene")
    assert "|2|a dog. The" in found
    assert found.endswith('{"reference_path": "a.png", "mask_strategy": "0"}')


def test_it_is_printed_recorded_and_not_enhanced_twice(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--model", "opensora-1.2", "-s", "1", "--enhance-prompt"]
    assert main([*command, "-p", "a cat"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "a-cat-1.mp4\n"
    text = enhance_prompt("a cat")
    assert f"enhanced prompt: {text}" in captured.err
    record = read_metadata(folder / "a-cat-1.mp4")["request"]
    assert (record["prompt"], record["original_prompt"]) == (text, "a cat")

    assert main([*command, "-C", "a-cat-1.mp4", "-o", "b.mp4"]) == 0
    assert "it stays" in capsys.readouterr().err
    again = read_metadata(folder / "b.mp4")["request"]
    assert (again["prompt"], again["original_prompt"]) == (text, "a cat")
    assert main(["generate", "-C", "b.mp4", "-p", "a dog", "-o", "c.mp4"]) == 0
    assert "original_prompt" not in read_metadata(folder / "c.mp4")["request"]

    (folder / "p.txt").write_text("a cat\n")
    lines = ["--prompt-path", "p.txt", "--prompt-as-path", "--llm-refine", "True"]
    assert main(["generate", "--model", "opensora-1.2", *lines]) == 0
    assert main(["generate", "--model", "opensora-1.2", *lines]) == 0
    assert "skipped: a cat.mp4" in capsys.readouterr().err
    assert read_metadata(folder / "a cat.mp4")["request"]["prompt"] == text


@pytest.mark.parametrize("prompts", [["-p", "a cat"], ["--prompt-file", "p.txt"]])
def test_checkpoints_are_looked_for_by_the_typed_prompt(
    prompts: list[str], folder: Path, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(request: GenerationRequest, *rest: Any, enhance: bool) -> GenerationRequest:
        assert (request.prompt, enhance) == ("a cat", True)
        return request.with_seed(3)

    monkeypatch.setattr("mlx_sora.pipeline.resume.continue_checkpoint", find)
    (folder / "p.txt").write_text("a cat\n")
    options = ["--model", "opensora-1.2", "--enhance-prompt", "--checkpoint-every", "1"]
    assert main(["generate", *options, *prompts, "-o", "{seed}.mp4"]) == 0
    assert read_metadata(folder / "3.mp4")["request"]["original_prompt"] == "a cat"


def test_a_model_of_few_words_keeps_its_prompts(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--model", "shapes", "-p", DRAWN, "-o", "a.mp4", "--enhance-prompt"]
    assert main(command) == 0
    assert "The prompt stays as it is: the model draws only what it knows." in (
        capsys.readouterr().err
    )
    assert read_metadata(folder / "a.mp4")["request"]["prompt"] == DRAWN


def test_a_language_model_gets_the_prompt_and_what_can_be_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = answer(monkeypatch, '<think>a {cat}?</think>\n"A cat {runs} | far\x1b"\n')
    guide = ModelFolder.open(bundled_folder()).card.guide()
    assert enhance_prompt("a cat", "some/model", guide) == "A cat (runs) , far"
    command, more = calls[0]
    assert command[:4] == [sys.executable, "-m", "mlx_lm", "generate"]
    assert more["input"].endswith("Prompt: a cat")
    assert guide in more["input"]
    answer(monkeypatch, "A cat walks. " * 200)
    found = enhance_prompt("a cat", "some/model")
    assert len(found) <= MAX_CHARACTERS
    assert found.endswith("walks.")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (("", 1, "Traceback\nValueError: no such thing\n"), "mlx-lm failed with m: ValueError"),
        (("", 3, ""), "exit code 3"),
        (("<think>hm", 0, ""), "wrote nothing"),
    ],
)
def test_a_failure_is_one_line(
    result: tuple[str, int, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, *result)
    with pytest.raises(MlxSoraError) as caught:
        enhance_prompt("a cat", "m")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enhance, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "mlx_sora\[enhance\]"'):
        enhance_prompt("a cat", "m")
    answer(monkeypatch, "")
    with pytest.raises(UsageError, match=r"no language model in \./none"):
        enhance_prompt("a cat", "./none")
    assert main(["generate", "--resume", "x", "--enhance-prompt"]) == 2


@pytest.mark.skipif(find_spec("mlx_lm") is None, reason="needs mlx-lm")
def test_mlx_lm_itself_writes(tmp_path: Path) -> None:
    model = write_language_model(tmp_path / "llama")
    found = enhance_prompt("a cat", str(model))
    assert found
    assert found == enhance_prompt("a cat", str(model))
    (model / "config.json").write_text("{")
    with pytest.raises(MlxSoraError, match="mlx-lm failed"):
        enhance_prompt("a cat", str(model))
