"""`python -m mlx_sora serve` as a process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.web import Web

SERVE = ("-m", "mlx_sora", "serve")


@dataclass(frozen=True)
class ServerProcess:
    """A server that runs. link: the address that it printed."""

    process: subprocess.Popen[str]
    link: str

    @property
    def web(self) -> Web:
        return Web(int(self.link.split(":")[2].split("/")[0]))

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def server_process(
    folder: Path, *options: str, program: Sequence[str] = SERVE, cwd: Path | None = None
) -> Iterator[ServerProcess]:
    """Run a server on a free port inside the block; its stderr is in FOLDER.log."""
    log = folder.with_name(f"{folder.name}.log")
    words = [sys.executable, *program, "--folder", str(folder), "--port", "0", *options]
    with log.open("w") as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=cwd)
    assert process.stdout is not None
    try:
        link = process.stdout.readline().strip()
        assert link.startswith("http://"), log.read_text()
        yield ServerProcess(process, link)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.stdout.close()
