"""GenerationRequest: types, meaning, and the round trip through plain values."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mlx_sora.errors import UsageError
from mlx_sora.request.generation import MAX_SEED, GenerationRequest, label, options


def test_defaults_need_no_conversion() -> None:
    """Requests take them as they are."""
    assert all(spec.convert(spec.default) is spec.default for spec in options().values())


FULL = {
    "prompt": "a cat",
    "model": "shapes",
    "seed": 3,
    "steps": 12,
    "guidance": 5.5,
    "resolution": "240p",
    "aspect_ratio": "1:1",
    "num_frames": "2s",
    "fps": 12.0,
    "negative_prompt": "blurry",
    "images": (("a.png", 0, 1.0), ("b.png", -1, 0.5)),
    "videos": (("a.mp4", "after", 34, 1.0),),
    "image_guidance": "joint",
    "mask_strategy": "0,0,0,0,1,0.5",
    "references": ("a.png", "b.mp4"),
    "loop": 2,
    "condition_frames": 34,
    "condition_edit": 0.25,
    "long": "windows",
    "scene_blend": 17,
    "aesthetic": 6.0,
    "motion": 4.0,
    "camera": "pan left",
    "lpl": "adaptive:patience=2,tolerance=0.001,minimum=0.25",
    "tdtm": "15",
    "dtype": "float32",
    "quantize": 8,
    "output": "x.mp4",
    "overwrite": True,
    "embed_metadata": False,
    "metadata": True,
    "preview_every": 5,
}


def test_request_round_trips_through_a_dict() -> None:
    request = GenerationRequest.from_dict(FULL)
    request.validate()
    assert request.to_dict() == FULL
    assert GenerationRequest.from_dict(request.to_dict()) == request


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ("a.png", [("a.png", 0, 1.0)]),
        (Path("a.png"), [("a.png", 0, 1.0)]),
        (["a.png", ("b.png", "last"), ["c.png", "-3", "0.5"]], None),
        ([["a.png", "first", 1]], [("a.png", 0, 1.0)]),
    ],
    ids=str,
)
def test_images_take_paths_frames_and_strengths(images: object, expected: object) -> None:
    if expected is None:
        expected = [("a.png", 0, 1.0), ("b.png", -1, 1.0), ("c.png", -3, 0.5)]
    assert list(GenerationRequest(images=images).images) == expected  # type: ignore[arg-type]


def test_references_take_a_list_or_joined_paths() -> None:
    assert GenerationRequest(references="a.png;b.mp4").references == ("a.png", "b.mp4")  # type: ignore[arg-type]
    assert GenerationRequest(references=["a.png"]).references == ("a.png",)  # type: ignore[arg-type]


def test_request_with_media_is_plain_json() -> None:
    text = json.dumps(GenerationRequest.from_dict(FULL).to_dict())
    assert GenerationRequest.from_dict(json.loads(text)) == GenerationRequest.from_dict(FULL)


def test_request_records_only_its_prompt_by_default() -> None:
    assert GenerationRequest(prompt="a").to_dict() == {"prompt": "a"}
    assert GenerationRequest().to_dict() == {"prompt": ""}


def test_values_are_converted_to_the_type_of_the_field() -> None:
    request = GenerationRequest(
        prompt="a", seed=np.int64(4), fps=24, num_frames=" 51 ", output=Path("a") / "b.mp4"
    )
    assert (request.seed, request.fps, request.num_frames) == (4, 24.0, 51)
    assert type(request.seed) is int
    assert type(request.fps) is float
    assert request.output == str(Path("a") / "b.mp4")
    assert GenerationRequest(prompt="a", output="frames/").output == "frames/"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", 5),
        ("prompt", "\ud800"),
        ("seed", True),
        ("seed", 1.5),
        ("steps", "many"),
        ("steps", "1_0"),
        ("guidance", float("nan")),
        ("guidance", "inf"),
        ("guidance", 10**400),
        ("fps", False),
        ("images", 5),
        ("images", [["a.png", "middle"]]),
        ("images", [["a.png", 0, 1.5]]),
        ("images", [["a.png", 0, 0]]),
        ("images", [["a.png", 0, 1, 2]]),
        ("images", [[]]),
        ("videos", [["a.mp4", "beside"]]),
        ("videos", [["a.mp4", "after", 0]]),
        ("references", [3]),
        ("overwrite", 1),
        ("overwrite", "yes"),
        ("output", ""),
        ("output", "a\0b.mp4"),
        ("num_frames", 2.5),
        ("num_frames", []),
        ("sampler", "euler"),
        ("dtype", "half"),
        ("vae_dtype", "auto"),
        ("quantize", 7),
        ("quantize", "half"),
        ("quantize", "mixed:2"),
        ("quantize", "t5=4,t5=8"),
        ("quantize", "vae=4"),
        ("quantize", "t5=mixed:4"),
        ("quantize", ""),
        ("camera", 3),
        ("lpl", "never"),
        ("lpl", True),
        ("tdtm", 0),
        ("tdtm", 2.5),
    ],
)
def test_wrong_value_raises_and_names_the_option(name: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        GenerationRequest.from_dict({"prompt": "a", name: value})
    assert re.search(rf"(?<!-){name}\b", str(caught.value))
    assert label(name) in caught.value.flag_text
    assert "\n" not in str(caught.value)


def test_wrong_choice_lists_the_choices() -> None:
    with pytest.raises(UsageError, match="auto, float32, bfloat16, float16"):
        GenerationRequest(prompt="a", dtype="half")


@pytest.mark.parametrize("name", [name for name, option in options().items() if option.required])
def test_required_option_refuses_none(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        GenerationRequest.from_dict({name: None})


def test_field_is_required_unless_its_type_allows_none() -> None:
    """Every other default is None, which stands for the default of the model."""
    for field in dataclasses.fields(GenerationRequest):
        assert options()[field.name].required == ("None" not in str(field.type))


def test_unknown_option_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean guidance"):
        GenerationRequest.from_dict({"prompt": "a", "guidence": 3})
    with pytest.raises(UsageError, match="Valid: prompt, model"):
        GenerationRequest.from_dict({"xyzzy": 3})


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": ""},
        {"prompt": " \n\t"},
        {"seed": -1},
        {"seed": MAX_SEED + 1},
        {"steps": 0},
        {"steps": 1001},
        {"guidance": -0.1},
        {"fps": 0},
        {"fps": 1000},
        {"preview_every": 0},
        {"width": 64},
        {"height": 64},
        {"width": 64, "height": 0},
        {"width": 64, "height": -8},
        {"width": 64, "height": 100_000},
        {"width": 64, "height": 64, "resolution": "144p"},
        {"width": 64, "height": 64, "aspect_ratio": "1:1"},
        {"resolution": "100p"},
        {"resolution": "240p", "aspect_ratio": "5:1"},
        {"aspect_ratio": "wide"},
        {"num_frames": 0},
        {"num_frames": -17},
        {"num_frames": 2},
        {"num_frames": 16},
        {"num_frames": "3s"},
    ],
)
def test_validate_refuses_unsupported_values(values: dict[str, object]) -> None:
    request = GenerationRequest.from_dict({"prompt": "a", **values})
    with pytest.raises(UsageError):
        request.validate()


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 0},
        {"seed": MAX_SEED},
        {"steps": 1},
        {"guidance": 0},
        {"guidance": 1},
        {"width": 64, "height": 64},
        {"resolution": "144p"},
        {"aspect_ratio": "1:1"},
        {"num_frames": 1},
        {"num_frames": 17},
        {"num_frames": "4s"},
    ],
)
def test_validate_accepts_supported_values(values: dict[str, object]) -> None:
    request = GenerationRequest.from_dict({"prompt": "a", **values})
    request.validate()
    assert values.items() <= request.to_dict().items()


def test_with_seed_keeps_or_draws_a_seed() -> None:
    assert GenerationRequest(prompt="a", seed=0).with_seed(7).seed == 0
    assert GenerationRequest(prompt="a").with_seed(0).seed == 0
    drawn = {GenerationRequest(prompt="a").with_seed().seed for _ in range(8)}
    assert len(drawn) > 1
    assert all(seed is not None and 0 <= seed <= MAX_SEED for seed in drawn)


def test_request_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationRequest(prompt="a").prompt = "b"  # type: ignore[misc]


@pytest.mark.parametrize("name", [name for name, option in options().items() if option.high])
def test_validate_checks_every_range(name: str) -> None:
    option = options()[name]
    assert option.low is not None
    assert option.high is not None
    for value in (option.low, option.high):
        GenerationRequest.from_dict({"prompt": "a", name: value}).validate()
    for value in (option.low - 1, option.high + 1):
        request = GenerationRequest.from_dict({"prompt": "a", name: value})
        with pytest.raises(UsageError, match=f"Give {option.low} to {option.high}.") as caught:
            request.validate()
        shown = getattr(request, name)
        assert f"{option.label} {shown} is out of range." in caught.value.flag_text
        assert f"{name}={shown} is out of range." in str(caught.value)


def test_flags_are_unique_and_follow_from_the_name() -> None:
    flags = [flag for option in options().values() for flag in option.flags]
    assert len(flags) == len(set(flags))
    assert [options()[name].flags for name in ("steps", "images", "guidance", "references")] == [
        ("--steps",),
        ("--image",),
        ("--guidance", "--guidance-scale", "--cfg-scale"),
        (),
    ]
