"""Numbers of other types are taken wherever text stands for a number."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import GenerationRequest, Lpl, StepCache, UsageError
from mlx_sora.request.edit import EditRequest

WHOLE = [
    4,
    "4",
    4.0,
    np.int8(4),
    np.uint64(4),
    np.float32(4),
    np.array(4),
    mx.array(4),
    Decimal("4.0"),
    Fraction(8, 2),
]

#: Options with a whole number; a tuple of them stands in a reference.
INTEGERS = ("seed", "steps", "num_frames", "width", "vae_tiles", "preview_every")


@pytest.mark.parametrize("value", WHOLE, ids=lambda value: f"{type(value).__name__} {value}")
def test_whole_numbers(value: object) -> None:
    request = GenerationRequest.from_dict(
        dict.fromkeys(INTEGERS, value)
        | {"guidance": value, "tdtm": value, "memory_budget": value}
        | {"images": [("a.png", value, 1)], "videos": [("a.mp4", "after", value)]}
    )
    assert all(type(getattr(request, name)) is int for name in INTEGERS)
    assert {getattr(request, name) for name in INTEGERS} == {request.guidance} == {4}
    assert type(request.guidance) is float
    assert (str(request.tdtm), request.memory_budget) == ("4", "4")
    assert (request.images[0].frame, request.videos[0].frames) == (4, 4)
    assert StepCache(each=value) == StepCache(each=4)  # type: ignore[arg-type]
    assert Lpl(after=value) == "fixed:4"  # type: ignore[arg-type]
    assert EditRequest("a.png", "a", inject_steps=value).inject_steps == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [0.5, "0.5", np.float16(0.5), np.array(0.5), mx.array(0.5), Decimal("0.5"), Fraction(1, 2)],
)
def test_fractions(value: object) -> None:
    request = GenerationRequest.from_dict({"guidance": value, "images": [("a.png", 0, value)]})
    assert (request.guidance, request.images[0].strength) == (0.5, 0.5)
    assert type(request.guidance) is float
    with pytest.raises(UsageError, match="steps must be a whole number"):
        GenerationRequest.from_dict({"steps": value})
    assert str(StepCache("online", threshold=value)).startswith("online:threshold=0.5")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [
        *(True, np.bool_(True), np.array(True), float("nan"), np.float64("inf"), Decimal("NaN")),
        *("nan", np.array([4]), np.array([4, 5]), complex(4), "4 steps", b"4", [4]),
    ],
    ids=lambda value: f"{type(value).__name__} {value!r}",
)
def test_what_is_no_number_is_refused_in_a_line(value: object) -> None:
    for name in (*INTEGERS, "guidance", "fps", "tdtm", "memory_budget"):
        if name in ("num_frames", "memory_budget") and isinstance(value, str):
            continue  # lengths and amounts: checked when they are resolved
        with pytest.raises(UsageError, match=f"^{name} must be") as error:
            GenerationRequest.from_dict({name: value})
        assert "\n" not in str(error.value)


def test_switches_take_booleans_of_numpy() -> None:
    assert GenerationRequest(overwrite=np.bool_(True)).overwrite is True  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [Decimal("sNaN"), Decimal("inf"), Fraction(10**400, 3)])
def test_no_whole_numbers(value: object) -> None:
    with pytest.raises(UsageError, match="steps must be a whole number"):
        GenerationRequest.from_dict({"steps": value})


def test_a_number_beyond_floats_is_out_of_range() -> None:
    with pytest.raises(UsageError, match="steps"):
        GenerationRequest.from_dict({"prompt": "a", "steps": 10**400}).validate()
