"""The standard streams of the process, as the command line needs them."""

from __future__ import annotations

import io
import os
import sys


def prepare_streams() -> None:
    """Open closed standard streams on the null device, and let none fail at a character.

    Daemons and launchers of desktops close them. A file that is opened next would take the number
    of a closed one, and what reads or prints would fail. A path that the encoding of a stream
    cannot show is printed with escapes.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # Takes the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
