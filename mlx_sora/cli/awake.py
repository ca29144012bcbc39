"""A Mac does not fall asleep while a command works. The Python API leaves that to its caller."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


def add_sleep_flag(parser: argparse._ActionsContainer) -> argparse.Action:
    """Add --allow-sleep to a command that may run for long; `stay_awake` reads it."""
    return parser.add_argument(
        "--allow-sleep",
        action="store_true",
        help="let a Mac fall asleep during the command; its display may turn off in any case",
    )


@contextmanager
def stay_awake(args: argparse.Namespace) -> Iterator[None]:
    """Keep a Mac awake inside the block, if the command has --allow-sleep and it is not given.

    macOS ends caffeinate with this process, however that ends.
    """
    if platform.system() != "Darwin" or getattr(args, "allow_sleep", True):
        yield
        return
    command = ["caffeinate", "-i", "-w", str(os.getpid())]
    nothing = subprocess.DEVNULL
    try:
        process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)
    except OSError as error:
        logger.debug("the Mac may fall asleep: no caffeinate", exc_info=error)
        yield
        return
    try:
        yield
    finally:
        process.terminate()
        process.wait()
