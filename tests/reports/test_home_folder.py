"""~ stands for the home folder in every path (pharmpy/pharmpy #1778, where it was a name).

Shells expand it only at the start of a word: not in --model=~/m, JSON, prompts or Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sora.cli.main import build_parser
from mlx_sora.errors import MlxSoraError
from mlx_sora.loading.model_folder import model_path, weights_root
from mlx_sora.manage.conversion_plan import ConversionOptions
from mlx_sora.manage.convert import convert
from mlx_sora.manage.doctor import find_folder
from mlx_sora.pipeline import Pipeline
from mlx_sora.request.edit import EditRequest
from mlx_sora.request.generation import GenerationRequest, options
from mlx_sora.request.options import as_images, as_path, as_paths, as_videos
from mlx_sora.request.techniques import StepCache
from mlx_sora.text.prompt import split_directives
from mlx_sora.utils.files import cache_folder
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.output_path import output_path

NAME = "~/some file"


def request(**values: Any) -> GenerationRequest:
    return GenerationRequest.from_dict({"prompt": "a", **values})


def table_of(cache: object) -> str:
    """The message about the table that is not there names its path."""
    with pytest.raises(MlxSoraError) as caught:
        Pipeline.from_pretrained("shapes")("a", step_cache=cache, num_frames=1)
    return str(caught.value).removeprefix("No table of schedules at ").split(".")[0]


#: What each option with a path opens.
OPTIONS: dict[str, Callable[[], object]] = {
    "prompt": lambda: (split_directives(f'a{{"reference_path": "{NAME}"}}')[1].references or "")[0],
    "model": lambda: model_path(str(request(model=NAME).model)),
    "images": lambda: request(images=[[NAME, 1]]).images[0].path,
    "videos": lambda: request(videos=NAME).videos[0].path,
    "references": lambda: request(references=[NAME]).references[0],
    "step_cache": lambda: table_of(f"table:4,file={NAME}"),
    "output": lambda: output_path(
        str(request(output=NAME).output), prompt="a", seed=0, num_frames=17
    ).with_suffix(""),
}

#: Flags beside the options of a request. Those of `USED` are expanded where they are used.
USED: dict[tuple[str, str], Callable[[], object]] = {
    ("doctor", "path"): lambda: find_folder(NAME),
    ("info", "model"): lambda: model_path(NAME),
    ("convert", "source"): lambda: model_path(NAME),
    ("edit", "video"): lambda: EditRequest(NAME, "a").video,
}
OTHER_FLAGS = {
    ("generate", "config_from_metadata"),
    ("generate", "prompt_file"),
    ("generate", "resume"),
    ("generate", "enhance_prompt"),
    ("calibrate", "table"),
    ("calibrate", "material"),
    ("reconstruct", "video"),
    ("memory", "folder"),
    ("serve", "folder"),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_table_lists_every_option_with_a_path() -> None:
    readers = (as_path, as_images, as_videos, as_paths, StepCache.parse)
    found = {name for name, option in options().items() if option.parse in readers}
    assert found | {"prompt"} == OPTIONS.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, home: Path) -> None:
    assert str(OPTIONS[name]()) == str(home / "some file")


def flags() -> dict[tuple[str, str], argparse.Action]:
    """Every flag and argument of the commands that takes a path."""
    found: dict[tuple[str, str], argparse.Action] = {}

    def visit(parser: argparse.ArgumentParser, command: str) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    visit(child, name)
            elif action.metavar in ("FILE", "FOLDER", "MODEL", "SRC", "DST", "VIDEO", "PATH"):
                found[command, action.dest] = action

    visit(build_parser(), "")
    return found


def test_the_table_lists_every_flag_with_a_path() -> None:
    found = {key for key in flags() if key[1] not in OPTIONS or key[0] == "info"}
    assert found == USED.keys() | OTHER_FLAGS | {("convert", "target")}


@pytest.mark.parametrize("key", sorted(OTHER_FLAGS))
def test_flags(key: tuple[str, str], home: Path) -> None:
    read = flags()[key].type
    assert callable(read)
    assert str(read(NAME)) == str(home / "some file")


@pytest.mark.parametrize("key", sorted(USED))
def test_flags_with_names_of_models_and_videos(key: tuple[str, str], home: Path) -> None:
    assert str(USED[key]()) == str(home / "some file")


def test_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SORA_WEIGHTS", "~/w")
    monkeypatch.setenv("MLX_SORA_CACHE", "~/c")
    assert (weights_root(), cache_folder()) == (home / "w", home / "c")


def test_python(home: Path, pipe: Pipeline) -> None:
    made = pipe("red", steps=1, num_frames=1, width=64, height=64, seed=1)
    assert made.save("~/a.png") == home / "a.png"
    assert read_metadata("~/a.png")["request"]["prompt"] == "red"
    with pytest.raises(MlxSoraError, match=str(home)):
        pipe.resume("~/missing.checkpoint.safetensors")
    convert(pipe.model, Path("~/m"), ConversionOptions())
    assert (home / "m" / "vae").is_dir()
    edited = pipe.edit("~/a.png", source_prompt="red", prompt="blue", steps=1, output="~/b.png")
    assert edited.path == home / "b.png"
