"""The command line on several ranks with a fault in one: RANK MOMENT FAULT, then the words.

MOMENT: start (the ranks have met), encode, denoise (after the second step), decode or write.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Generator
from typing import Any

import mlx_sora.pipeline.engine
from mlx_sora.cli.main import main
from mlx_sora.distributed import heartbeat
from mlx_sora.distributed.group import Ranks
from mlx_sora.distributed.launch import launch_rank
from mlx_sora.distributed.watchdog import Watchdog
from mlx_sora.errors import WeightsError
from mlx_sora.runtime.events import Event, StageFinished, StageStarted, StepFinished
from mlx_sora.utils.versions import versions

#: Shorter than for users, so that tests do not wait.
TIMEOUTS = {"interval": 0.2, "silence": 8.0, "busy": 6.0}
heartbeat.Timeouts = functools.partial(heartbeat.Timeouts, **TIMEOUTS)  # type: ignore[misc,assignment]

Events = Generator[Event, None, None]


def fail(kind: str) -> None:
    """Fail in the way `kind` names."""
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "interrupted":
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "spins":
        while True:
            pass
    if kind == "breaks":
        raise RuntimeError("no such kernel")
    if kind == "weights":
        raise WeightsError("block 3 is damaged.", "Download it again.")


def comes(moment: str, event: Event) -> bool:
    """Return True if the event begins the moment."""
    if moment == "denoise":
        return isinstance(event, StepFinished) and event.step == 1
    if moment == "write":
        return isinstance(event, StageFinished) and event.stage == "decode"
    return isinstance(event, StageStarted) and event.stage == moment


def install(moment: str, kind: str) -> None:
    """Arrange for the fault."""
    if kind == "other-version":
        real = versions()
        mlx_sora.pipeline.engine.versions = lambda: real | {"mlx": "0.1"}  # type: ignore[attr-defined]
    if kind == "other-weights":
        mlx_sora.pipeline.engine.fingerprint = lambda *_: "abc"  # type: ignore[attr-defined]
    meet, watch_events = Watchdog.meet, Ranks.watch_events

    def meet_and_fail(watchdog: Watchdog) -> None:
        meet(watchdog)
        if moment == "start":
            fail(kind)

    def with_fault(events: Events) -> Events:
        for event in events:
            if comes(moment, event):
                fail(kind)
            yield event

    def watch(ranks: Ranks, events: Events) -> Any:
        return watch_events(ranks, with_fault(events))

    Watchdog.meet = meet_and_fail  # type: ignore[method-assign]
    Ranks.watch_events = watch  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    rank, moment, kind, *words = sys.argv[1:]
    if launch_rank() == int(rank):
        install(moment, kind)
    sys.exit(main(words))
