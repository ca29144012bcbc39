"""Defaults of MLX's environment variables."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mlx_sora.runtime.switches import DEFAULTS

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
