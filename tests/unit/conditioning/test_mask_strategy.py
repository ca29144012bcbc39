"""Mask strategies as text."""

from __future__ import annotations

import pytest

from mlx_sora.conditioning.mask_strategy import (
    MaskGroup,
    append_generated,
    parse_mask_strategy,
)
from mlx_sora.errors import UsageError


def test_defaults_fill_the_end_of_a_group() -> None:
    assert parse_mask_strategy("1;0,1,0,-1,2,0.5") == [
        MaskGroup(loop=1),
        MaskGroup(reference=1, target_start=-1, length=2, edit_ratio=0.5),
    ]
    assert parse_mask_strategy(None) == parse_mask_strategy("") == []


def test_text_and_placement_are_one() -> None:
    placement = MaskGroup(2, 1, -5, 0, 5, 0.25)
    assert parse_mask_strategy(str(placement)) == [placement]


def test_clips_go_behind_the_references() -> None:
    placements = append_generated([1, 2], 3, 5, 0.25)
    assert list(map(str, placements)) == ["1,3,-5,0,5,0.25", "2,4,-5,0,5,0.25"]


@pytest.mark.parametrize(
    "text", ["a", "0;", "0,0.5", "0,0,0,0,1,x", "0,0,0,0,1,0,9", "0,0,0,0,1,nan"]
)
def test_unreadable_strategies(text: str) -> None:
    with pytest.raises(UsageError, match="Cannot parse"):
        parse_mask_strategy(text)
