"""Start ranks over loopback as mlx.launch does, without its parent, which keeps a core busy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    """Return free ports."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def launch(
    ranks: int,
    words: Sequence[str],
    *,
    cwd: Path | None = None,
    timeout: float = 600,
    linger: float = 60,
    variables: Mapping[str, str] | None = None,
    stdin: str = "",
) -> list[subprocess.CompletedProcess[str]]:
    """Run `python WORDS` on so many ranks; return the finished processes, by rank.

    linger: seconds that the others may run after rank 0 has ended; then they are killed. stdin: of
    rank 0; the others have none, as under mlx.launch.
    """
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
        env = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        if ranks > 1:
            env["MLX_HOSTFILE"] = str(hosts)
        env |= variables or {}
        running = [
            subprocess.Popen(
                [sys.executable, *words],
                env=env | {"MLX_RANK": str(rank)},
                cwd=cwd,
                stdin=subprocess.DEVNULL if rank else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        outputs: list[tuple[str, str]] = []
        try:
            for each in running:
                try:
                    text = None if outputs else stdin
                    limit = linger if outputs else timeout
                    outputs.append(each.communicate(text, timeout=limit))
                except subprocess.TimeoutExpired:
                    if not outputs:
                        raise
                    each.kill()
                    outputs.append(each.communicate())
        finally:
            for each in running:
                each.kill()
    return [
        subprocess.CompletedProcess(each.args, each.returncode, *output)
        for each, output in zip(running, outputs, strict=True)
    ]
