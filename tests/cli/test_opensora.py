"""Commands of Open-Sora's scripts/inference.py: each flag works, or its refusal names ours."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlx_sora.cli import generate, opensora
from mlx_sora.cli.flags import Parser, parse_args
from mlx_sora.cli.main import main
from mlx_sora.cli.requests import RequestBatch, read_requests
from mlx_sora.errors import UsageError
from mlx_sora.request.generation import GenerationRequest
from tests.helpers.fake_pipeline import FakePipeline

GUIDE = Path(opensora.__file__).with_name("README.md").read_text(encoding="utf-8")


def parse(words: str) -> argparse.Namespace:
    parser = Parser(prog="mlx_sora")
    generate.add_parser(parser.add_subparsers())
    return parse_args(parser, ["generate", *shlex.split(words)])


def batch(words: str) -> RequestBatch:
    return read_requests(parse(words))


def request(words: str) -> GenerationRequest:
    found = batch(f"{words} -p 'a cat' -o x.mp4").requests
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--num-sampling-steps 7", {"steps": 7}),
        ("--cfg-scale 3", {"guidance": 3.0}),
        ("--aes 6.5 --flow 5 --camera-motion 'pan left'", {"aesthetic": 6.5, "motion": 5.0}),
        ("--camera-motion 'pan left'", {"camera": "pan left"}),
        ("--image-size 480 854", {"height": 480, "width": 854}),
        ("--num-frames 4s --resolution 720p", {"num_frames": "4s", "resolution": "720p"}),
        ("--loop 2 --condition-frame-length 10", {"loop": 2, "condition_frames": 34}),
        ("--reference-path 'a.png;b.mp4' --mask-strategy '0;0,1'", {"mask_strategy": "0;0,1"}),
        ("--reference-path 'a.png;b.mp4'", {"references": ("a.png", "b.mp4")}),
        ("--dtype bf16", {"dtype": "bfloat16"}),
        ("--fps 8 --save-fps 8 --frame-interval 1", {"fps": 8.0}),
        ("--watermark False --batch-size 4 --seed 3", {"seed": 3}),
    ],
)
def test_a_flag_sets_what_it_sets_there(words: str, expected: dict[str, Any], folder: Path) -> None:
    found = request(words)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--ckpt-path a.pth", "--model FOLDER"),
        ("--save-fps 8", "--fps 8"),
        ("--frame-interval 3 --fps 24", "--fps N"),
        ("--condition-frame-length 4", "--condition-frames"),
        ("--watermark True", "--watermark"),
        ("--prompt-generator dogs", "--prompt"),
        ("--steps 3 --num-sampling-steps 4", "--steps"),
        ("--num-sample 2 --seed 1 2", "--num-sample"),
        ("--save-dir d", "--output and --save-dir"),
        ("--mask-strategy 0 1", "--mask-strategy has 2"),
        ("--reference-path a b", "--reference-path has 2"),
        ("--flow fast", "--flow"),
        ("--num-sample -1", "--num-sample"),
        ("--num-sample 0", "Give 1 to 1000"),
        ("--num-sample 9999", "Give 1 to 1000"),
        ("--resume x --num-sample 2", "of one video"),
        ("--watermark maybe", "True or False"),
        ("--verbose 2", "--verbose"),
        ("configs/opensora-v1-2/inference/sample.py", "config"),
    ],
)
def test_a_refusal_says_what_to_give(words: str, named: str, folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        request(words)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--flow 5 --aspect-ratio 9:16 --resolution 240p", "(240x426); Open-Sora's 9:16 (426x240)"),
        ("--flow 5 --aspect-ratio 50:27", "is --aspect-ratio 12:25"),
        ("--flow 5 --aspect-ratio 1:1", ""),
        ("--aspect-ratio 9:16", ""),
        ("--flash-attn False", "--flash-attn has no effect here"),
    ],
)
def test_a_warning_tells_what_is_read_otherwise(
    words: str, expected: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request(words)
    assert expected in caplog.text if expected else caplog.text == ""


def test_files_are_named_as_there(folder: Path) -> None:
    def outputs(words: str) -> list[str]:
        found = batch(f"-p 'a cat.{{}}' 'two dogs' --start-index 3 {words}").requests
        return [str(each.output) for each in found]

    assert outputs("") == ["sample_0003", "sample_0004"]
    assert outputs("--save-dir . --sample-name im") == ["./im_0003", "./im_0004"]
    assert outputs("--prompt-as-path --num-frames 1") == ["a cat..png", "two dogs.png"]
    names = ["a cat.-0.mp4", "a cat.-1.mp4", "two dogs-0.mp4", "two dogs-1.mp4"]
    assert outputs("--prompt-as-path --num-sample 2") == names
    with pytest.raises(UsageError, match="cannot be the name of a file"):
        batch("-p 'a/b c' --prompt-as-path")


def test_samples_have_the_seeds_that_follow(folder: Path) -> None:
    found = batch("-p 'a cat' 'a dog' --num-sample 2 --seed 5").requests
    pairs = [(each.prompt, each.seed) for each in found]
    assert pairs == [("a cat", 5), ("a cat", 6), ("a dog", 5), ("a dog", 6)]
    drawn = [each.seed or 0 for each in batch("-p 'a cat' --num-sample 3").requests]
    assert drawn == [drawn[0], drawn[0] + 1, drawn[0] + 2]


def test_references_belong_to_their_prompts(folder: Path) -> None:
    words = "-p 'a cat' 'a dog' --reference-path '' b.png --mask-strategy '' 0"
    found = batch(words).requests
    assert [(each.references, each.mask_strategy) for each in found] == [
        ((), ""),
        (("b.png",), "0"),
    ]


def test_several_prompts_need_quotes(folder: Path) -> None:
    assert [each.prompt for each in batch("-p 'a cat' -p dog").requests] == ["a cat", "dog"]
    with pytest.raises(UsageError, match="3 texts.*Put each prompt in quotes"):
        batch("-p a red circle")
    with pytest.raises(UsageError, match="--prompt-file"):
        batch("-p 'a cat' -p -")


def test_vbench_makes_what_is_missing(
    folder: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "p.txt").write_text("a cat\n\na dog\na cow\n")
    command = ["generate", "--prompt-path", "p.txt", "--prompt-as-path", "--num-sample", "2"]
    assert main([*command, "--start-index", "1", "--end-index", "2"]) == 0
    assert {path.name for path in folder.glob("*.mp4")} == {"a dog-0.mp4", "a dog-1.mp4"}
    assert main([*command, "--end-index", "2"]) == 0
    assert sorted(capsys.readouterr().out.split("\n")[2:]) == ["", "a cat-0.mp4", "a cat-1.mp4"]
    assert main([*command, "--start-index", "3"]) == 2
    assert "between --start-index and --end-index" in capsys.readouterr().err
    (folder / "p.jsonl").write_text('{"prompt": "a cat", "output": "own.mp4"}\n')
    found = batch("--prompt-path p.jsonl --sample-name n").requests
    assert [each.output for each in found] == ["own.mp4"]


def test_the_flags_are_hidden_and_stand_in_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help-all"])
    shown = re.findall(r"--[a-z-]+", capsys.readouterr().out)
    flags = {opensora._flag(name) for name in opensora._flags()}
    assert len(flags) > 20
    assert flags & set(shown) == set()
    rows = " ".join(row.split("|")[1] for row in GUIDE.splitlines() if row.startswith("| `"))
    assert flags - set(re.findall(r"--[a-z-]+", rows)) == set()


def test_the_commands_of_the_guide_work(folder: Path) -> None:
    """In one process; those that only plan, also with ratios as Open-Sora writes them."""
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE))
    lines = blocks.splitlines()
    plans = [line for line in lines if "--dry-run" in line]
    assert len(plans) > 4
    for line in [*lines, *(plan.replace("16:9", "9:16") for plan in plans[:2])]:
        words = shlex.split(line)
        if words[0] != "mlx_sora":
            subprocess.run(["bash", "-euc", line], check=True, capture_output=True)
        else:
            assert main([*words[1:], "--model", "shapes"]) == 0, line
