"""Start ranks over loopback by mlx.launch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]

#: Replaces the standard input of a rank, which mlx.launch otherwise keeps asking whether it can
#: write to it. That takes a core of those that the ranks need.
_WITHOUT_INPUT = ("bash", "-c", 'exec "$@" </dev/null', "-")

_EXIT_CODE = re.compile(r"Node with rank (\d+) exited with code (-?\d+)")


@dataclass
class Launch:
    """A running mlx.launch. stdout, stderr: files of what all ranks print."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    def pids(self) -> dict[int, int]:
        """Return the process of each rank, as soon as all run."""
        found: dict[int, int] = {}
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                rank = child.environ().get("MLX_RANK")
                if rank is not None:
                    found[int(rank)] = child.pid
        return found

    def wait(self, seconds: float) -> bool:
        """Wait until all ranks have ended. Return False after so many seconds."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self.calm()
            time.sleep(0.1)
        return self.process.poll() is not None

    def calm(self) -> None:
        """Let mlx.launch notice that the ranks read no input."""
        assert self.process.stdin is not None, "a pipe"
        with suppress(OSError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()


@dataclass(frozen=True)
class Launched:
    """What mlx.launch and all ranks have printed, and the exit code of each rank."""

    stdout: str
    stderr: str
    codes: list[int]

    @property
    def errors(self) -> list[str]:
        """Lines that tell of errors."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def free_port(count: int) -> int:
    """Return the first of `count` free ports in a row."""
    while True:
        with suppress(OSError, OverflowError):
            sockets = [socket.socket() for _ in range(count)]
            try:
                sockets[0].bind(("127.0.0.1", 0))
                first = int(sockets[0].getsockname()[1])
                for offset, each in enumerate(sockets[1:], start=1):
                    each.bind(("127.0.0.1", first + offset))
                return first
            finally:
                for each in sockets:
                    each.close()


@contextmanager
def launching(
    ranks: int,
    words: Sequence[str],
    *,
    cwd: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Launch]:
    """Start `python WORDS` on so many ranks; kill what still runs when the block ends."""
    launcher = Path(sys.executable).with_name("mlx.launch")
    port = str(free_port(ranks))
    command = [str(launcher), "-n", str(ranks), "-p", port, "--", *_WITHOUT_INPUT]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"} | (variables or {})
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        with stdout.open("wb") as out, stderr.open("wb") as err:
            process = subprocess.Popen(
                [*command, sys.executable, *words],
                env=env,
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
            )
        launch = Launch(process, stdout, stderr)
        try:
            yield launch
        finally:
            for pid in launch.pids().values():
                with suppress(psutil.Error):
                    psutil.Process(pid).kill()
            process.kill()
            process.communicate()


def launch(
    ranks: int,
    words: Sequence[str],
    *,
    cwd: Path | None = None,
    timeout: float = 600,
    variables: Mapping[str, str] | None = None,
) -> Launched:
    """Run `python WORDS` on so many ranks, which have no standard input, to the end."""
    with launching(ranks, words, cwd=cwd, variables=variables) as running:
        ended = running.wait(timeout)
        stderr = running.stderr.read_text(errors="replace")
        assert ended, f"still running after {timeout} s: {stderr}"
        codes = {int(rank): int(code) for rank, code in _EXIT_CODE.findall(stderr)}
        stdout = running.stdout.read_text(errors="replace")
    return Launched(stdout, stderr, [codes.get(rank, 0) for rank in range(ranks)])
