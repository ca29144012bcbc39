"""Every flag of `generate` reaches its option, and help has two levels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.request.generation import options, options_of
from tests.helpers.fake_pipeline import FakePipeline

WORDS = (
    "generate --prompt p --model shapes --seed 5 --steps 4 --cfg-scale 3 --sampler rflow "
    "--sequential-guidance "
    "--resolution 144p --aspect-ratio 1:1 --frames 34 --fps 12 --aesthetic 6 --motion 2 "
    "--camera pan --lpl fixed:2 --tdtm 3 --dtype float32 --preset fast -q 8 "
    "-o out.gif --overwrite "
    "--memory-budget 2GB --device-profile mac-8gb --ci-dl --vae-tiles 2 --parallel both "
    "--vae-dtype bfloat16 "
    "--image one.jpg --image two.jpg -1 0.5 --video c.mkv after 34 --negative-prompt n "
    "--refine 240p --refine-strength 0.5 "
    "--loop 2 --condition-frames 34 --condition-edit 0.5 --long windows --scene-blend 0 "
    "--image-guidance noised "
    "--step-cache every:2 --guidance-interval 100,900 --guidance-cache every:2 "
    "--no-embed-metadata --metadata --no-health-check --checkpoint-every 3 --preview-every 2 "
    "--scale 4 --keep-previews --no-text-cache"
)


#: Options that these words set.
VALUES = {
    "prompt": "p",
    "model": "shapes",
    "seed": 5,
    "scale": 4,
    "steps": 4,
    "guidance": 3.0,
    "sequential_guidance": True,
    "resolution": "144p",
    "aspect_ratio": "1:1",
    "num_frames": 34,
    "fps": 12.0,
    "aesthetic": 6.0,
    "motion": 2.0,
    "camera": "pan",
    "lpl": "fixed:2",
    "tdtm": "3",
    "dtype": "float32",
    "vae_dtype": "bfloat16",
    "memory_budget": "2GB",
    "device_profile": "mac-8gb",
    "ci_dl": True,
    "vae_tiles": 2,
    "parallel": "both",
    "preset": "fast",
    "quantize": 8,
    "step_cache": "every:2,warmup=6,order=0",
    "guidance_interval": "100,900",
    "guidance_cache": "every:2,after=0.333,boost=1",
    "images": (("one.jpg", 0, 1.0), ("two.jpg", -1, 0.5)),
    "videos": (("c.mkv", "after", 34, 1.0),),
    "image_guidance": "noised",
    "refine": "240p",
    "refine_strength": 0.5,
    "negative_prompt": "n",
    "loop": 2,
    "condition_frames": 34,
    "condition_edit": 0.5,
    "long": "windows",
    "scene_blend": 0,
    "output": "out.gif",
    "overwrite": True,
    "embed_metadata": False,
    "metadata": True,
    "health_check": False,
    "checkpoint_every": 3,
    "preview_every": 2,
    "keep_previews": True,
    "text_cache": False,
}


def test_flag_reaches_its_field(folder: Path, pipeline: FakePipeline) -> None:
    for name in ("one.jpg", "two.jpg", "c.mkv"):
        (folder / name).touch()
    assert main(WORDS.split()) == 0
    assert pipeline.requests[0].to_dict() == VALUES
    assert pipeline.loaded == [("shapes", "float32")]
    words = "generate -p p --width 64 --height 32 --num-frames 1"
    assert main(words.split()) == 0
    sized = pipeline.requests[1]
    assert (sized.width, sized.height, sized.num_frames) == (64, 32, 1)
    python_only = {"mask_strategy", "references", "original_prompt"}
    covered = {*VALUES, *python_only, "sampler", "width", "height"}
    assert covered == set(options())


COMMANDS = {name.split()[0]: name for name in ("generate", "edit", "calibrate", "bench memory")}


def shown(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), flag])
    assert caught.value.code == 0
    return capsys.readouterr().out


def names(text: str, flag: str) -> bool:
    return re.search(rf"^  .*{flag}\b", text, re.MULTILINE) is not None


@pytest.mark.parametrize(("task", "command"), COMMANDS.items())
def test_help_shows_common_options_and_help_all_shows_all(
    task: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short, full = (shown(command, flag, capsys) for flag in ("--help", "--help-all"))
    for option in options_of(task).values():
        for flag in option.typed_flags:
            assert names(full, flag)
            assert names(short, flag) == option.common, flag
    assert f"mlx_sora {command} --help-all" in short
    assert len(re.findall(r"^  (?:-\w, )?--", short, re.MULTILINE)) <= 30
