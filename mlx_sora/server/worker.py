"""The process of one job: the command line of mlx_sora, which ends with its server.

The server sends the words of the command as one line of JSON on standard input, and leaves that
open. Its end is the end of the server: the command is interrupted, and writes its checkpoint.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress

#: Seconds that an interrupted command has to end.
GRACE = 20


def main() -> None:
    """Run the command that standard input names."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored behind a shell's `&`
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return
    server = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with, args=(server,), daemon=True).start()
    from mlx_sora.loading.model_folder import weights_root

    with suppress(OSError):  # the name of a model is a folder in it
        os.chdir(weights_root())
    sys.argv = ["mlx_sora", *json.loads(line)]
    runpy.run_module("mlx_sora", run_name="__main__")


def _end_with(server: int) -> None:
    while os.read(server, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
