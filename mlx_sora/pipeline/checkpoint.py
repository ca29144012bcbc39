"""What a run knew after a step, as one file that another run can go on from.

A safetensors file: latents and states as tensors, and a JSON record in its metadata, which says
where in the run they belong and what the run was about. It appears under its name whole or not at
all, and tells when a byte of it has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.sampling.base import State
from mlx_sora.utils.files import atomic_write, explain_os_errors
from mlx_sora.utils.json import parse_object
from mlx_sora.utils.state import flatten_state, unflatten_state
from mlx_sora.utils.versions import versions
from mlx_sora.video.output_path import CHECKPOINT

#: Number of the file's layout; a reader refuses larger ones.
FORMAT = 1

#: Fields of Snapshot that are no lists in JSON.
_LISTS = ("finished", "accounts", "warnings", "resumed")

_FIX = "Delete it to begin anew."


@dataclass(frozen=True)
class Snapshot:
    """Where a run stands.

    request: its options, seed included. identity: all that its latents depend on, as JSON values.
    output: name of the video, in the folder of the checkpoint. finished: latents [1, T, H, W, C] of
    the clips whose steps are all made; accounts: what accelerations did in each. latents, steps,
    state: those of the clip after them, None and nothing where it has not begun. warnings, resumed:
    what was told, and where the run was taken up before, for the metadata. versions: of what wrote
    it.
    """

    request: Mapping[str, Any]
    identity: Mapping[str, Any]
    output: str
    finished: tuple[mx.array, ...] = ()
    accounts: tuple[Mapping[str, Any], ...] = ()
    latents: mx.array | None = None
    steps: int = 0
    state: State | None = None
    warnings: tuple[str, ...] = ()
    resumed: tuple[Mapping[str, int], ...] = ()
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def clip(self) -> int:
        """The clip that is being made, from 0."""
        return len(self.finished)

    def save(self, path: Path) -> None:
        """Write it to `path`, in place of what is there. Raises MlxSoraError."""
        arrays: dict[str, mx.array] = {}
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        record = json.dumps(flatten_state(found, "run", arrays))
        metadata = {"format": str(FORMAT), "record": record, "sha256": _digest(record, arrays)}
        with explain_os_errors(path):
            path.parent.mkdir(exist_ok=True)  # that of a sequence of pictures
            with atomic_write(path, overwrite=True) as file, file.partial.open("wb") as handle:
                mx.save_safetensors(handle, arrays, metadata)

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read it, all arrays evaluated.

        Raises UsageError where there is none or it is of a newer version; WeightsError where it is
        damaged.
        """
        metadata = _metadata(path)
        if metadata["format"] != str(FORMAT):
            raise UsageError(
                f"{path} is a checkpoint of format {metadata['format'][:9]}, not {FORMAT}.",
                "Go on with the version of mlx_sora that wrote it.",
            )
        try:
            arrays = mx.load(str(path), format="safetensors")
            assert isinstance(arrays, dict)
            if _digest(metadata["record"], arrays) != metadata["sha256"]:
                raise ValueError("its checksum is wrong")
            record = unflatten_state(parse_object(metadata["record"]), arrays)
            record |= {name: tuple(record[name]) for name in _LISTS}
            if not _sound(record):
                raise ValueError("its record is of another kind")
            return cls(**record)
        except (OSError, RuntimeError, ValueError, TypeError, LookupError) as error:
            raise WeightsError(f"The checkpoint {path} is damaged: {error}.", _FIX) from error


def read_record(path: Path) -> dict[str, Any]:
    """The record of a checkpoint alone, unchecked; what `Snapshot.load` raises, or ValueError."""
    return parse_object(_metadata(path)["record"])


def _sound(record: Mapping[str, Any]) -> bool:
    """Whether every field is of its kind, as in a file that we wrote; output: in its folder."""
    objects = [record[name] for name in ("request", "identity", "versions")]
    objects += [*record["accounts"], *record["resumed"]]
    name, latents, steps = record["output"], record["latents"], record["steps"]
    return (
        all(isinstance(item, dict) for item in objects)
        and isinstance(name, str)
        and name not in ("", "..")
        and name == Path(name).name
        and all(isinstance(z, mx.array) for z in record["finished"])
        and (latents is None or isinstance(latents, mx.array))
        and (record["state"] is None or isinstance(record["state"], dict))
        and type(steps) is int
        and steps >= 0
        and all(isinstance(text, str) for text in record["warnings"])
    )


def _metadata(path: Path) -> dict[str, str]:
    """What stands in the file's header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            found: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        if not path.is_file():
            raise UsageError(f"No such checkpoint: {path}.", "Check the path.") from None
        reason = str(error).splitlines()[0][:120]
        raise WeightsError(f"The checkpoint {path} is damaged: {reason}.", _FIX) from error
    if not {"format", "record", "sha256"} <= found.keys():
        raise UsageError(f"{path} is no checkpoint of a run.", f"Give a file NAME{CHECKPOINT}.")
    return found


def _digest(record: str, arrays: Mapping[str, mx.array]) -> str:
    """Checksum of the record and of all tensors, which it evaluates."""
    found = hashlib.sha256(record.encode())
    for name in sorted(arrays):
        array = arrays[name]
        found.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        found.update(memoryview(array.reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]
    return found.hexdigest()
