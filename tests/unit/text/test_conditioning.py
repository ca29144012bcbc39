"""Mask strategies as text."""

from __future__ import annotations

import pytest

from mlx_sora.errors import UsageError
from mlx_sora.text.conditioning import (
    Placement,
    append_generated,
    continuation,
    frames_of_latents,
    parse_mask_strategy,
)


def test_defaults_fill_the_end_of_a_group() -> None:
    assert parse_mask_strategy("1;0,1,0,-1,2,0.5") == [
        Placement(loop=1),
        Placement(reference=1, target_start=-1, length=2, edit=0.5),
    ]
    assert parse_mask_strategy(None) == parse_mask_strategy("") == []


def test_text_and_placement_are_one() -> None:
    placement = Placement(2, 1, -5, 0, 5, 0.25)
    assert parse_mask_strategy(str(placement)) == [placement]


def test_continuation_is_appended() -> None:
    strategy = append_generated(None, continuation(1, 0, 5))
    assert strategy == "1,0,-5,0,5,0.0"
    assert parse_mask_strategy(append_generated("0", continuation(2, 1, 5)))[1].loop == 2


@pytest.mark.parametrize(
    "text", ["a", "0;", "0,0.5", "0,0,0,0,1,x", "0,0,0,0,1,0,9", "0,0,0,0,1,nan"]
)
def test_unreadable_strategies(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        parse_mask_strategy(text)


def test_frames_of_whole_chunks() -> None:
    assert frames_of_latents(10) == 34
    with pytest.raises(UsageError, match="multiple of 5"):
        frames_of_latents(7)
