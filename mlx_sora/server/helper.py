"""Helper: a child process that does what would make the server heavy, and ends when it is idle.

It plans, reads what clients send, and makes thumbnails: with MLX, numpy, PyAV and Pillow, which
the server never imports. A file that breaks one of them breaks the child.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mlx_sora import errors
from mlx_sora.errors import MlxSoraError

logger = logging.getLogger(__name__)

HELPER = (sys.executable, "-m", "mlx_sora.server.helper_process")

#: Seconds for one answer; longest answer in bytes.
_TIMEOUT, _MAX_LINE = 120.0, 8 << 20


class Helper:
    """The child, started when it is needed. It answers one call after the other."""

    def __init__(self, program: Sequence[str] = HELPER, timeout: float = _TIMEOUT) -> None:
        self._program, self._timeout = program, timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer to a call. Raises the MlxSoraError that the child raised."""
        line = json.dumps({"call": name, **arguments}).encode() + b"\n"
        with self._lock:
            # A child that was idle may end just now.
            reply = self._ask(line) or self._ask(line)
        if reply is None:
            raise MlxSoraError(
                f"This took over {self._timeout:.0f} s or broke the reader ({name}).",
                "Send something smaller.",
            )
        result, error = json.loads(reply)
        if error is not None:
            kind = getattr(errors, error["type"], MlxSoraError)
            raise kind(error["message"], error["fix"])
        found: dict[str, Any] = result
        return found

    def close(self) -> None:
        """End the child."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _ask(self, line: bytes) -> bytes | None:
        """Return the child's answer, or None if it has ended."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(self._timeout, process.kill)
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline(_MAX_LINE)
        except OSError:
            reply = b""
        finally:
            timer.cancel()
        if reply.endswith(b"\n"):
            return reply
        self._discard(process)
        return None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            self._discard(self._process)
        pipe = subprocess.PIPE
        return subprocess.Popen(self._program, stdin=pipe, stdout=pipe, start_new_session=True)

    def _discard(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()
        self._process = None
