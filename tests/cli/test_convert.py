"""`convert` from the outside, on the bundled model: written, checked, described and used."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from mlx_sora import Pipeline
from mlx_sora.cli.main import main
from mlx_sora.loading.model_folder import WEIGHTS_VARIABLE, bundled_folder
from mlx_sora.manage.convert import ConversionResult, staging_folder
from mlx_sora.video.metadata import read_metadata
from tests.helpers.quantizable_model import write_model

GENERATE = ["generate", "--steps", "2", "--num-frames", "1", "--seed", "3", "--quiet", "-p"]


def test_convert_and_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "shapes", "small", "-q", "8"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{folder / 'small'}\n"
    assert "convert transformer" in captured.err
    assert captured.err.endswith("MB written\n")
    assert main(["convert", "shapes", "small", "-q", "8"]) == 0
    assert capsys.readouterr().err == "already converted\n"

    for name in ("preview.json", "step_cache/30-steps-64x64-17.json"):
        assert (folder / "small" / name).read_bytes() == (bundled_folder() / name).read_bytes()

    assert main(["info", "--model", "small"]) == 0
    out = capsys.readouterr().out
    assert out.count("quantization: 8 bits in groups of 64") == 2
    assert "converted from: " in out
    assert "sizes as recorded, from shapes." in out
    assert main(["info", "--model", "small", "--json"]) == 0
    small = json.loads(capsys.readouterr().out)
    assert main(["info", "--model", "shapes", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert small["parameters"] == plain["parameters"]
    assert small["parts"]["transformer"]["bytes"] < 0.65 * plain["parts"]["transformer"]["bytes"]
    assert {word.partition(" ")[0] for word in small["checks"].values()} <= {
        "all",
        "fits",
        "T5's,",
        "generate",
        "sizes",
    }

    for name, words in (
        ("whole", []),
        ("streamed", ["--ci-dl"]),
        ("small", ["--memory-budget", "1GB"]),
    ):
        words += ["--model", "small", "-o", f"{name}.png"]
        assert main([*GENERATE, "a red circle", *words]) == 0
    assert (folder / "whole.png").stat().st_size > 0
    kind = {"bits": 8, "group_size": 64}
    table = kind | {"shared": kind}
    record = read_metadata("streamed.png")
    assert record["quantization"] == {"text_encoder": table, "transformer": kind}
    from PIL import Image

    pictures = [Image.open(f"{name}.png").tobytes() for name in ("whole", "streamed", "small")]
    assert pictures[0] == pictures[1] == pictures[2]


def test_quantized_while_loading(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = {"bits": 8, "group_size": 64}
    table = kind | {"shared": kind}
    for name, words in (("whole", []), ("streamed", ["--ci-dl"])):
        assert main([*GENERATE, "a red circle", "-q", "8", "-o", f"{name}.png", *words]) == 0
        record = read_metadata(f"{name}.png")
        assert record["quantization"] == {"text_encoder": table, "transformer": kind}
        assert record["request"]["quantize"] == 8
    from PIL import Image

    pictures = [Image.open(f"{name}.png").tobytes() for name in ("whole", "streamed")]
    assert pictures[0] == pictures[1]
    capsys.readouterr()
    assert main([*GENERATE, "a red circle", "-o", "plain.png"]) == 0
    assert Image.open("plain.png").tobytes() != pictures[0]
    assert "quantization" not in read_metadata("plain.png")
    assert main(["convert", "shapes", "small", "-q", "8", "--quiet"]) == 0
    assert main([*GENERATE, "a", "--model", "small", "-q", "4", "-o", "no.png"]) == 2
    assert "quantized to 8 bits" in capsys.readouterr().err


def test_compensation_is_nearer_at_the_same_size(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    prompts = ("a red circle growing on a white background", "a blue square moving up over gray")
    words = ["--gptq", "--steps", "2", "--distill", "3"]
    words += [f"--prompt={prompt}" for prompt in prompts]
    plain, made = folder / "plain", folder / "made"
    assert main(["convert", "shapes", "plain", "-q", "3", "--dtype", "float32"]) == 0
    assert "calibrate" not in capsys.readouterr().err
    assert main(["convert", "shapes", "made", "-q", "3", "--dtype", "float32", *words]) == 0
    shown = capsys.readouterr().err
    assert "calibrate transformer 100% 2/2" in shown
    assert "distill transformer 100% 5/5" in shown
    assert main(["convert", "shapes", "made", "-q", "3", "--dtype", "float32", *words]) == 0
    assert capsys.readouterr().err == "already converted\n"
    assert main(["info", "--model", str(made)]) == 0
    assert "gptq:\n  prompts: 2\n  steps: 2\n  distill: 3\n" in capsys.readouterr().out
    for part in ("text_encoder", "transformer"):
        assert (made / part / "config.json").read_bytes() == (
            plain / part / "config.json"
        ).read_bytes()
    options = {"seed": 0, "steps": 3, "num_frames": 17, "text_cache": False}
    videos = [
        Pipeline(model)("a green triangle moving left on a black background", **options).frames
        for model in ("shapes", plain, made)
    ]
    exact, *others = (frames.astype(float) for frames in videos)
    rounded, compensated = (float(np.square(frames - exact).mean()) for frames in others)
    assert compensated < 0.7 * rounded, (compensated, rounded)

    file = made / "transformer/model-00002-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["doctor", str(made)]) == 4
    line = next(x for x in capsys.readouterr().out.splitlines() if "Repair: " in x)
    command = line.partition("Repair: python -m mlx_sora ")[2]
    assert shlex.split(command)[3:-2] == ["--quantize", "3", "--dtype", "float32", *words]


def test_the_named_command_mends_a_conversion(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "shapes", "small", "-q", "4", "--dtype", "float32", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    file = folder / "small/transformer/model-00002-of-00005.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["doctor", "small"]) == 4
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("ERROR")]
    command = line.partition("Repair: python -m mlx_sora ")[2]
    assert main(command.split()) == 0
    assert file.read_bytes() == content
    capsys.readouterr()
    assert main(["doctor", "small", "--quick"]) == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["shapes"], 2, "DST"),
        (["shapes", "x", "-q", "7"], 2, "--quantize must be 3, 4, 5, 6, 8, mxfp4"),
        (
            ["shapes", "x", "-q", "mixed:4"],
            2,
            "calibrate --bits --prompt TEXT --steps 10 --model shapes",
        ),
        (["nowhere", "x"], 4, "No model folder"),
        (["shapes", "x", "--gptq"], 2, "--gptq is for --quantize"),
        (["shapes", "x", "-q", "4", "-p", "a circle"], 2, "--prompt is for --gptq"),
        (["shapes", "x", "-q", "4", "--steps", "3"], 2, "--steps is for --gptq"),
        (["shapes", "x", "-q", "4", "--distill", "3"], 2, "--distill is for --gptq"),
        (["shapes", "x", "-q", "4", "--gptq", "--steps", "0"], 2, "--steps 0 is out of range"),
        (["shapes", "x", "-q", "4", "--gptq", "--distill", "-1"], 2, "--distill must be 0 or more"),
        (["shapes", "x", "-q", "t5=4", "--gptq", "--distill", "1"], 2, "a quantized transformer"),
        (["shapes", "x", "-q", "4", "--gptq", "-p", ""], 2, "prompt is empty"),
        (["shapes", "x", "-q", "mxfp4", "--gptq"], 2, "--gptq does not round to mxfp4"),
        (["shapes", "taken", "-q", "8"], 2, "--overwrite"),
        (["shapes", "taken/file/x"], 4, "Cannot use"),
        (["opensora-1.2-8bit", "x"], 4, "download opensora-1.2 --quantize 8"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "file").write_text("mine")
    assert main(["convert", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert (folder / "taken" / "file").read_text() == "mine"


def test_an_interruption_says_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlx_sora.manage.convert.index_text", interrupt)
        assert main(["convert", "shapes", "small", "-q", "8"]) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert staging_folder(folder / "small").is_dir()
    assert main(["doctor", "small", "--quick"]) == 4
    assert "interrupted conversion" in capsys.readouterr().out
    assert main(["convert", "shapes", "small", "-q", "8"]) == 0
    assert "13 files of an earlier attempt reused" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["small"]


def test_a_new_model_without_a_name_gets_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(model: object, target: Path, *_: object, **__: object) -> ConversionResult:
        return ConversionResult(target, 0, 0, True)

    monkeypatch.setattr("mlx_sora.manage.convert.convert", convert)
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    for words, name in (
        (["-q", "8"], "shapes-8bit"),
        (["-q", "3", "--gptq"], "shapes-3bit-gptq"),
        (["--dtype", "float16"], "shapes-float16"),
    ):
        assert main(["convert", "shapes", *words]) == 0
        assert capsys.readouterr().out == f"{tmp_path / name}\n"
    assert main(["convert", "shapes"]) == 2
    assert "needs a name" in capsys.readouterr().err
    write_model(tmp_path / "other")
    assert main(["convert", "other", "-q", "4", "--gptq"]) == 2
    assert "other suggests no prompts for --gptq" in capsys.readouterr().err
