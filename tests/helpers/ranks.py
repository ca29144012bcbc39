"""Ranks over loopback: as mlx.launch starts them, without its parent, which keeps a core busy."""

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
    """Ports that nobody listens on."""
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
    """Run `python WORDS` on so many ranks; what each came to, by rank.

    linger: seconds that others may go on after the first has ended; then they are killed. stdin:
    what the first reads there; the others find nothing, as under mlx.launch.
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
        told = []
        try:
            for each in running:
                try:
                    said = None if told else stdin
                    told.append(each.communicate(said, timeout=linger if told else timeout))
                except subprocess.TimeoutExpired:
                    if not told:
                        raise
                    each.kill()
                    told.append(each.communicate())
        finally:
            for each in running:
                each.kill()
    return [
        subprocess.CompletedProcess(each.args, each.returncode, *said)
        for each, said in zip(running, told, strict=True)
    ]
