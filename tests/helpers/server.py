"""A server of `mlx_sora serve` in a process of its own, and what tests ask of it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any


class ServerProcess:
    """`mlx_sora serve` over a folder, on a free port of this machine unless `port` names one.

    link: the address that it prints. url: the same, without a token and the last slash.
    """

    def __init__(self, folder: Path, *flags: str, port: int = 0) -> None:
        words = ["-m", "mlx_sora", "serve", "--folder", str(folder), "--port", str(port), *flags]
        self.log = folder.parent / f"{folder.name}.log"
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, *words], stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        self.link = self._process.stdout.readline().strip()
        assert self.link, self.log.read_text()
        self.url = re.sub(r"/(\?.*)?$", "", self.link)
        self.port = int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        self._process.wait(30)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON that the API answers."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def ids(self) -> set[str]:
        """Return the identifiers of the newest hundred videos."""
        return {video["id"] for video in self.call("GET", "/v1/videos?limit=100")["data"]}

    def wait_until_done(self, id: str, seconds: float = 60) -> dict[str, Any]:
        """Return the object of a video once it is neither queued nor running."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            video: dict[str, Any] = self.call("GET", f"/v1/videos/{id}")
            if video["status"] not in ("queued", "in_progress"):
                return video
            time.sleep(0.1)
        raise AssertionError(f"{id} is not finished: {video}")
