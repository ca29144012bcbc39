"""Measured speeds as values: what they give, and what is refused from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from mlx_sora.memory.speeds import MachineSpeeds, NetworkSpeed
from tests.helpers.speeds import SPEEDS


def test_seconds_are_work_and_weights_over_their_speeds() -> None:
    speed = NetworkSpeed(flops=2e9, seconds_per_byte=1e-9)
    assert speed.seconds(4e9) == pytest.approx(2)
    assert speed.seconds(4e9, 3e9) == pytest.approx(5)


def test_a_type_that_is_not_measured_counts_as_float32() -> None:
    assert SPEEDS.network("transformer", "bfloat16").flops == 2e12
    assert SPEEDS.network("vae", "bfloat16") == SPEEDS.network("vae", "float32")


def test_speeds_survive_json() -> None:
    assert MachineSpeeds.from_dict(json.loads(json.dumps(SPEEDS.to_dict()))) == SPEEDS


@pytest.mark.parametrize(
    "change",
    [
        {"bandwidth": 0},
        {"disk": -1.0},
        {"disk": "fast"},
        {"latency": float("nan")},
        {"products": [1]},
        {"networks": {}},
        {"networks": {name: {} for name in ("text_encoder", "transformer", "vae")}},
        {"machine": None},
    ],
    ids=str,
)
def test_other_values_are_refused(change: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match="missing|lacks|plausible|is 0"):
        MachineSpeeds.from_dict({**SPEEDS.to_dict(), **change})
