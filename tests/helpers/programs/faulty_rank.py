"""The command line on several ranks with a fault in one: FAULT, then the words of the command.

The fault happens in rank 1 (rank 0 if the name begins with "first-") after its second step.
With "-gpu", that rank seems to have a GPU that may need 15 s for a block.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import mlx_sora.pipeline.engine
from mlx_sora.cli.main import main
from mlx_sora.distributed import heartbeat
from mlx_sora.distributed.launch import launch_rank
from mlx_sora.errors import WeightsError
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.utils.versions import versions

#: Shorter than for users, so that tests do not wait.
heartbeat.Timeouts = functools.partial(heartbeat.Timeouts, 0.2, 8.0, 9.0)  # type: ignore[misc]


def fail(kind: str) -> None:
    """Fail in the way `kind` names."""
    if kind == "dies":
        os._exit(9)
    if kind.startswith("hangs"):
        time.sleep(60)
    if kind == "computes-gpu":
        time.sleep(11)
    if kind == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "weights":
        raise WeightsError("block 3 of the transformer is damaged.", "Download it again.")
    if kind == "interrupt":
        raise KeyboardInterrupt


def differ(kind: str) -> None:
    """Report another version or other weights than rank 0 has."""
    if kind == "other-version":
        real = versions()
        mlx_sora.pipeline.engine.versions = lambda: real | {"mlx": "0.1"}  # type: ignore[attr-defined]
    if kind == "other-weights":
        mlx_sora.pipeline.engine.fingerprint = lambda *_: "abc"  # type: ignore[attr-defined]


def install(kind: str) -> None:
    """Arrange for the fault."""
    finish_step = GenerationRun.finish_step

    def then(run: GenerationRun, step: Any, accelerations: Any) -> Iterator[Any]:
        yield from finish_step(run, step, accelerations)
        if step.step.index == 1:
            fail(kind)

    GenerationRun.finish_step = then  # type: ignore[method-assign]
    differ(kind)
    if kind.endswith("-gpu"):
        GenerationRun._longest_idle = lambda run, name: 15.0  # type: ignore[method-assign]


if __name__ == "__main__":
    name = sys.argv[1]
    if launch_rank() == (0 if name.startswith("first-") else 1):
        install(name.removeprefix("first-"))
    sys.exit(main(sys.argv[2:]))
