"""Variables by which a launcher (mlx.launch, mpirun) starts this process as one of several ranks.

Needs no MLX, so that the command line knows its rank at once.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

#: Variables that a launcher sets, and the backend that they are for.
_BACKENDS = {
    "MLX_HOSTFILE": "ring",
    "MLX_IBV_DEVICES": "jaccl",
    "NCCL_HOST_IP": "nccl",
    "OMPI_COMM_WORLD_SIZE": "mpi",
    "PMI_SIZE": "mpi",
}


def launch_backend() -> str | None:
    """Return the backend that connects this process with others; None for a single process."""
    for name, backend in _BACKENDS.items():
        value = os.environ.get(name, "")
        if backend == "mpi":
            if value.isdecimal() and int(value) > 1:
                return backend
        elif value and "MLX_RANK" in os.environ and not (backend == "ring" and _is_blank(value)):
            return backend
    return None


def launch_rank() -> int:
    """Return this process's rank by its environment, without connecting; 0 for a single process."""
    if launch_backend() is None:
        return 0
    names = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def launch_addresses() -> list[str]:
    """Return "host:port" of each rank, as the launcher gives it; "" where it does not.

    MLX's backend opens these TCP ports. Without a launcher the list has one entry.
    """
    backend = launch_backend()
    if backend == "mpi":
        size = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ["PMI_SIZE"]
        return [""] * int(size)
    with suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        if backend == "ring":
            return [str(node[0]) for node in json.loads(_read("MLX_HOSTFILE"))]
        if backend == "jaccl":
            others = len(json.loads(_read("MLX_IBV_DEVICES"))) - 1
            return [os.environ["MLX_JACCL_COORDINATOR"], *[""] * others]
        if backend == "nccl":
            first = f"{os.environ['NCCL_HOST_IP']}:{os.environ['NCCL_PORT']}"
            return [first, *[""] * (int(os.environ["MLX_WORLD_SIZE"]) - 1)]
    return [""]


def _read(variable: str) -> str:
    return Path(os.environ[variable]).read_text(encoding="utf-8")


def _is_blank(path: str) -> bool:
    """Return True for the host file without hosts that `mlx.launch -n 1` writes."""
    try:
        return not Path(path).read_text().strip()
    except OSError:
        return False
