"""Variables by which a launcher (mlx.launch, mpirun) starts this process as one of several ranks.

Needs no MLX, so that the command line knows its rank at once.
"""

from __future__ import annotations

import os
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


def _is_blank(path: str) -> bool:
    """Return True for the host file without hosts that `mlx.launch -n 1` writes."""
    try:
        return not Path(path).read_text().strip()
    except OSError:
        return False
