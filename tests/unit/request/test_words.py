"""Errors of the Python API speak of keywords, those of the command line of flags."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_sora import GenerationRequest, Pipeline, UsageError
from mlx_sora.pipeline.batch import as_known_error
from mlx_sora.request.edit import EditRequest
from mlx_sora.request.generation import options
from mlx_sora.request.words import in_keywords
from mlx_sora.runtime.events import RequestFailed
from tests.helpers.source import Source, sources


@pytest.mark.parametrize(
    ("flags", "keywords"),
    [
        ("--steps must be a whole number, not 'x'.", "steps must be a whole number, not 'x'."),
        ("--num-frames 9 is out of range.", "num_frames=9 is out of range."),
        ("Use --memory-budget 3.3GB or more.", 'Use memory_budget="3.3GB" or more.'),
        ("--memory-budget off tries it.", 'memory_budget="off" tries it.'),
        ("Use --memory-budget with 8GB, or off.", "Use memory_budget with 8GB, or off."),
        ("Give --overwrite or another --output.", "Give overwrite=True or another output."),
        ("--no-health-check continues anyway.", "health_check=False continues anyway."),
        ("--guidance 7.5 may be too high", "guidance=7.5 may be too high"),
        ("--cfg-scale 7", "guidance=7"),
        ("unknown --sampler 'euler'. Valid: rflow", "unknown sampler 'euler'. Valid: rflow"),
        ("--parallel guidance needs several", 'parallel="guidance" needs several'),
        ("--image a b.png is", 'images a b.png is'),
        ("--image a.png is. Use --video.", 'images="a.png" is. Use videos.'),
        ("or: --video 'a b.mp4' before 20", "or: videos=[('a b.mp4', \"before\", 20)]"),
        ("--video a.mp4 after: the last", 'videos=[("a.mp4", "after")]: the last'),
        ("or use --step-cache every:3.", 'or use step_cache="every:3".'),
        ("Give --prompt TEXT.", "Give prompt=TEXT."),
        ("--overwrite must be true or false", "overwrite must be true or false"),
        ("or --ci-dl --vae-tiles 2, or", "or ci_dl=True, vae_tiles=2, or"),
        ("--source-prompt, --inject-steps 0", "source_prompt, inject_steps 0"),
        ("Finish that one with --resume, or", "Finish that one with pipe.resume, or"),
        ("try another --endpoint.", "try another --endpoint."),
        ("a--steps 3 and ---- stay", "a--steps 3 and ---- stay"),
        (
            "Run: python -m mlx_sora download x --quantize 8, or use --quantize 8.",
            "Run: python -m mlx_sora download x --quantize 8, or use quantize=8.",
        ),
        (
            "mlx_sora edit --steps 3. Or --steps 4.",
            "mlx_sora edit --steps 3. Or steps=4.",
        ),
    ],
)  # fmt: skip
def test_flags_become_keywords(flags: str, keywords: str) -> None:
    assert in_keywords(flags, options()) == keywords


def strings(source: Source) -> Iterator[str]:
    """Every text of a module but its docstrings; VALUE stands for what is filled in."""
    inside = {
        id(part)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(source.tree):
        if isinstance(node, ast.JoinedStr):
            parts = [
                part.value if isinstance(part, ast.Constant) else "VALUE" for part in node.values
            ]
            yield "".join(map(str, parts))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
            and "\n" not in node.value
        ):
            yield node.value


def test_no_message_of_the_package_names_a_flag_in_python() -> None:
    """Every option's flag in every text of the modules that the API runs."""
    folders = (
        "request",
        "conditioning",
        "pipeline",
        "memory",
        "runtime",
        "video",
        "accel",
        "utils",
    )
    texts = [
        text
        for source in sources("mlx_sora")
        if source.module.split(".")[1:2] and source.module.split(".")[1] in folders
        for text in strings(source)
        if re.search(r"(?<![\w-])--[a-z]", text)
    ]
    assert len(texts) > 50
    flags = [flag for option in options().values() for flag in option.typed_flags if flag[1] == "-"]
    found = [in_keywords(text, options()) for text in texts if "mlx_sora" not in text]
    left = [t for t in found for flag in flags if re.search(rf"(?<![\w-]){flag}(?![\w-])", t)]
    assert left == []


def test_errors_of_the_api_speak_of_keywords(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="^num_frames must be a whole number") as caught:
        GenerationRequest("a", num_frames=2.5)  # type: ignore[arg-type]
    assert caught.value.flag_text.startswith("--num-frames must be")
    with pytest.raises(UsageError, match="^steps=0 is out of range"):
        pipe("a", steps=0)
    with pytest.raises(UsageError, match="^memory_budget and device_profile exclude each other"):
        pipe("a", memory_budget="auto", device_profile="mac-8gb")
    with pytest.raises(UsageError, match="^the prompt is empty. Give prompt=TEXT"):
        pipe.stream(" ")
    with pytest.raises(UsageError, match="Describe the video: source_prompt"):
        pipe.edit("a.png", source_prompt=" ", prompt="a")
    with pytest.raises(UsageError, match="An edit does not use loop"):
        EditRequest("a.png", "a", GenerationRequest("a", loop=2)).validate()
    (tmp_path / "a.png").touch()
    with pytest.raises(UsageError, match="Give overwrite=True or another output"):
        pipe("a", num_frames=1, output=tmp_path / "a.png")


def test_failures_in_a_batch_speak_of_keywords(pipe: Pipeline) -> None:
    (event,) = (
        e
        for e in pipe.stream_all([GenerationRequest("a", parallel="both", num_frames=1)])
        if isinstance(e, RequestFailed)
    )
    assert 'parallel="both" needs several ranks' in str(event.error)
    assert "--parallel both needs" in as_known_error(event.error).flag_text
