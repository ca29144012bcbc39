"""The machine file: speeds that `doctor --machine` measured, for later estimates."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_sora.errors import MlxSoraError, printable
from mlx_sora.memory.speeds import MachineSpeeds
from mlx_sora.runtime.device import describe_machine
from mlx_sora.utils.files import atomic_write, cache_folder
from mlx_sora.utils.json import read_object

FILE_NAME = "machine.json"

#: Version of the file's format.
FORMAT = 1

MEASURE_COMMAND = "python -m mlx_sora doctor --machine"

#: Facts of a machine on which its speeds depend, with the words for them in messages.
_FACTS = {
    "mlx": "version of MLX",
    "platform": "system",
    "backend": "backend",
    "device": "device",
    "memory": "memory",
    "blas": "BLAS",
    "threads": "number of threads",
}


@dataclass(frozen=True)
class KnownSpeeds:
    """Speeds of this machine, or None and one line that says why not."""

    speeds: MachineSpeeds | None = None
    notice: str = ""


def machine_identity() -> dict[str, Any]:
    """Return the facts of this machine on which its speeds depend."""
    facts = describe_machine()
    versions: Any = facts["versions"]
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS")
    return {
        "mlx": versions.get("mlx"),
        **{name: facts[name] for name in ("platform", "backend", "device", "memory", "blas")},
        # GPUs do not care, and an environment changes from shell to shell.
        "threads": (threads or str(os.cpu_count())) if facts["backend"] == "cpu" else None,
    }


def machine_file() -> Path:
    """Return the path of the machine file. Raises MlxSoraError without a home folder."""
    return cache_folder() / FILE_NAME


def write_speeds(speeds: MachineSpeeds, path: Path | None = None) -> Path:
    """Write the machine file, whole or not at all; return its path. Raises MlxSoraError."""
    path = path or machine_file()
    text = json.dumps({"format": FORMAT, **speeds.to_dict()}, indent=2) + "\n"
    with atomic_write(path, overwrite=True) as file:
        path.parent.mkdir(parents=True, exist_ok=True)
        file.partial.write_text(text, encoding="utf-8")
    return path


def read_speeds(path: Path | None = None) -> KnownSpeeds:
    """Return the measured speeds of this machine, if the file is there and still true."""
    try:
        path = path or machine_file()
        content = read_object(path)
        if content.get("format") != FORMAT:
            return _ignored(path, "is of another version of mlx_sora")
        speeds = MachineSpeeds.from_dict(content)
    except (FileNotFoundError, NotADirectoryError):
        return KnownSpeeds(None, f"To foresee seconds on this machine: {MEASURE_COMMAND}")
    except (OSError, ValueError, MlxSoraError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return _ignored(path, f"cannot be read ({printable(reason, 80)})")
    now = machine_identity()
    for name, words in _FACTS.items():
        if speeds.machine.get(name) != now[name]:
            return _ignored(path, f"was measured with another {words}")
    return KnownSpeeds(speeds)


def _ignored(path: Path | None, reason: str) -> KnownSpeeds:
    name = "The machine file" if path is None else str(path)
    return KnownSpeeds(None, f"{name} {reason} and is ignored. Measure again: {MEASURE_COMMAND}")
