"""A worker as the server starts it, that makes a text in place of a video, in milliseconds.

The prompt says what happens: "slow" takes 50 ms a step, "fail" ends with an error, "crash" is
killed in its second step, "wedge" does not end when it is interrupted. The text is the number of
the step at which each process began.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path


def emit(event: str, **values: object) -> None:
    """Print an event."""
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def option(words: list[str], name: str, default: str) -> str:
    """Return the value of a flag."""
    found = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return found[0] if found else default


def end_with_server() -> None:
    """End when standard input does."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)


def work(words: list[str]) -> None:
    """Make the text."""
    prompt, output = option(words, "prompt", ""), Path(option(words, "output", ""))
    total = int(option(words, "steps", "4"))
    checkpoint = output.with_name(output.name + ".checkpoint.safetensors")
    log = checkpoint.read_text() if checkpoint.exists() else ""
    if log.startswith("damaged"):
        emit("error", message=f"The checkpoint {checkpoint} is damaged: of course.", exit_code=4)
        sys.exit(4)
    first = len(log.split(";")[0].split(",")) if log else 0
    log = (log.partition(";")[2] + f" {first}") if log else "0"
    emit("stage_started", stage="denoise", total=total)
    for step in range(first, total):
        if prompt == "wedge":
            signal.signal(signal.SIGINT, lambda *_: None)
        if prompt in ("slow", "wedge"):
            time.sleep(0.05)
        if prompt == "crash" and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "fail":
            emit("error", message=f"Cannot write {output}: no reason. Try again.", exit_code=1)
            sys.exit(1)
        checkpoint.write_text(",".join("x" * (step + 1)) + ";" + log)
        emit("step_finished", step=step, total=total, t=0.0, seconds=0.05)
    emit("stage_finished", stage="denoise", seconds=0.1, peak_memory=1000, peak_rss=2000)
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(log)
    partial.replace(output)
    checkpoint.unlink(missing_ok=True)
    emit("finished", warnings=[], path=str(output))


def end_as_the_command_does(words: list[str]) -> None:
    """End an interrupted process: name the checkpoint."""
    checkpoint = option(words, "output", "") + ".checkpoint.safetensors"
    emit("error", message=f"interrupted. {checkpoint} has the steps so far.", exit_code=130)
    os._exit(130)


if __name__ == "__main__":
    line = sys.stdin.buffer.raw.readline()  # type: ignore[union-attr]
    if line:
        words = json.loads(line)
        signal.signal(signal.SIGINT, lambda *_: end_as_the_command_does(words))
        threading.Thread(target=end_with_server, daemon=True).start()
        work(words)
