"""Defaults of MLX's environment variables."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mlx_sora import Pipeline
from mlx_sora.runtime.device import describe_device
from mlx_sora.runtime.switches import DEFAULTS, missing_switches, switches

SCRIPT = """
import json, mlx_sora
from mlx_sora.runtime.switches import switches
print(json.dumps(switches()))
"""


@pytest.mark.parametrize("own", [{}, {"MLX_ENABLE_TF32": "1", "MLX_CONV_WINOGRAD": "0"}])
def test_importing_sets_defaults_and_keeps_values_of_the_user(own: dict[str, str]) -> None:
    names = (*DEFAULTS, "MLX_CONV_WINOGRAD")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**environment, **own},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert json.loads(output) == {**DEFAULTS, **own}


def test_what_another_run_had_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CONV_WINOGRAD", "0")
    assert missing_switches(switches()) == []
    recorded = {**switches(), "MLX_ENABLE_TF32": "1", "MLX_SORA_BLAS": "off"}
    del recorded["MLX_CONV_WINOGRAD"]
    expected = ["MLX_ENABLE_TF32=1", "no MLX_CONV_WINOGRAD", "MLX_SORA_BLAS=off"]
    assert missing_switches(recorded) == expected


@pytest.mark.parametrize("value", ["$(touch x)", "a b", "", "1" * 41, "\n", 1, ["1"]])
def test_values_of_others_that_are_not_plain_are_left_out(value: object) -> None:
    assert missing_switches({**switches(), "MLX_SORA_BLAS": value}) == []
    assert missing_switches([value]) == []


def test_a_record_names_device_and_switches(pipe: Pipeline) -> None:
    made = pipe("a red circle", steps=1, num_frames=1, width=32, height=32)
    assert made.metadata["mlx_switches"] == switches()
    assert made.metadata["device"] == describe_device()
    assert {"backend", "device", "blas_library"} == describe_device().keys()
