"""Checkpoints of runs: the file format, and the object that writes and restores them.

A checkpoint is a safetensors file: latents and states are tensors, and a JSON record in the file's
metadata holds everything else, with a checksum of it all. It lies beside the output, appears under
its name whole or not at all, and is deleted when the video is finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import MlxSoraError, UsageError, WeightsError
from mlx_sora.runtime.device import to_numpy
from mlx_sora.runtime.events import Event, Warned
from mlx_sora.sampling.base import State
from mlx_sora.utils.files import atomic_write, check_file, explain_os_errors
from mlx_sora.utils.json import parse_object
from mlx_sora.utils.state import flatten_state, unflatten_state
from mlx_sora.utils.versions import versions
from mlx_sora.video.output_path import CHECKPOINT_SUFFIX

log = logging.getLogger(__name__)

#: Version of the file format; others are refused.
FORMAT = 1

#: Fields of Snapshot that are tuples, which JSON has as lists.
_LISTS = ("finished", "accounts", "warnings", "resumed")

_FIX = "Delete it to start again."


@dataclass(frozen=True)
class Snapshot:
    """State of a run between two steps.

    request: its options, seed included. identity: all that its latents depend on, as JSON values.
    output: name of the video, in the folder of the checkpoint. finished: latents [1, T, H, W, C] of
    the finished clips. accounts: what the accelerations did in each. latents, steps, state: of the
    clip after them; None, 0 and None if it has not begun. warnings, resumed: warnings so far and
    earlier resumes, for the metadata. versions: of the packages that wrote the file.
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
        """Index of the unfinished clip."""
        return len(self.finished)

    def save(self, path: Path) -> None:
        """Write to `path`, replacing any file there. Raises MlxSoraError."""
        arrays: dict[str, mx.array] = {}
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        record = json.dumps(flatten_state(found, "run", arrays))
        metadata = {"format": str(FORMAT), "record": record, "sha256": _digest(record, arrays)}
        with explain_os_errors(path):
            path.parent.mkdir(exist_ok=True)  # the folder of a png sequence
            with atomic_write(path, overwrite=True) as file, file.partial.open("wb") as handle:
                mx.save_safetensors(handle, arrays, metadata)

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read from `path`, all arrays evaluated.

        Raises UsageError if there is none or its format is another; WeightsError if it is damaged.
        """
        metadata = _metadata(path)
        if metadata["format"] != str(FORMAT):
            raise UsageError(
                f"{path} is a checkpoint of format {metadata['format'][:9]}, not {FORMAT}.",
                "Resume with the version of mlx_sora that wrote it.",
            )
        try:
            arrays = mx.load(str(path), format="safetensors")
            assert isinstance(arrays, dict)
            if _digest(metadata["record"], arrays) != metadata["sha256"]:
                raise ValueError("its checksum is wrong")
            record = unflatten_state(parse_object(metadata["record"]), arrays)
            record |= {name: tuple(record[name]) for name in _LISTS}
            if not _is_valid(record):
                raise ValueError("its record is of another kind")
            return cls(**record)
        except (OSError, RuntimeError, ValueError, TypeError, LookupError) as error:
            raise WeightsError(f"The checkpoint {path} is damaged: {error}.", _FIX) from error


class Checkpoints:
    """Writes a checkpoint every `every` steps and restores an earlier one.

    Without a path it does nothing. Of several ranks the first owns the file and broadcasts what is
    in it, so that any number of ranks can go on from a checkpoint.
    """

    def __init__(
        self,
        path: Path | None = None,
        every: int = 1,
        new: Snapshot | None = None,
        source: Path | None = None,
    ) -> None:
        """Set up; new is the run before its first step, or as the file `source` holds it."""
        self._path, self._every, self._source = path, every, source
        self._written: Snapshot | None = None
        # States stay on disk until their clip begins: text is encoded first.
        self._current = None if new is None else replace(new, latents=None, state=None)
        self._finished = () if new is None else new.finished
        self._ranks = Ranks()
        self._warned = False
        #: Whether a file is written, by this rank or another.
        self.is_written = path is not None

    def share(self, ranks: Ranks) -> None:
        """Broadcast the finished clips of rank 0. Every rank of the run must call it."""
        self._ranks = ranks
        self.is_written = ranks.broadcast_object(self.is_written)
        self._finished = tuple(ranks.broadcast_state(self._finished))

    def finished(self, clip: int) -> mx.array | None:
        """Return the latents of a clip whose steps were all made before, or None."""
        return self._finished[clip] if clip < len(self._finished) else None

    def steps_done(self, clip: int) -> int:
        """Return the number of steps of an unfinished clip that were made before."""
        current = self._current
        return current.steps if current is not None and clip == current.clip else 0

    def restored(self, clip: int) -> Snapshot | None:
        """Return the state of a clip that was interrupted, or None."""
        snapshot = self._ranks.on_rank0(lambda: self._load(clip))
        if self._ranks.size == 1:
            return snapshot
        names = ("latents", "steps", "state")
        values = snapshot and {name: getattr(snapshot, name) for name in names}
        shared = self._ranks.broadcast_state(values)
        return None if shared is None else Snapshot({}, {}, "", **shared)

    def _load(self, clip: int) -> Snapshot | None:
        current = self._current
        if current is None or self._source is None or clip != current.clip or not current.steps:
            return None
        return Snapshot.load(self._source)

    def finish_step(self, z: mx.array, steps: int, state: State) -> Iterator[Event]:
        """Record that `steps` steps of the clip led to z; write when it is time."""
        if self._current is not None:
            self._current = replace(self._current, latents=z, steps=steps, state=state)
            if steps % self._every == 0:
                yield from self._write()

    def finish_clip(self, z: mx.array, account: Mapping[str, Any]) -> Iterator[Event]:
        """Record that the clip ended at z. account: what the accelerations did in it."""
        if self._current is not None:
            self._current = replace(
                self._current,
                finished=(*self._current.finished, z),
                accounts=(*self._current.accounts, account),
                latents=None,
                steps=0,
                state=None,
            )
            yield from self._write()

    def set_warnings(self, warnings: Sequence[str]) -> None:
        """Record the warnings so far."""
        if self._current is not None:
            self._current = replace(self._current, warnings=tuple(warnings))

    @contextmanager
    def save_on_error(self) -> Iterator[None]:
        """If anything ends the block early, write the last step that was finished in it."""
        before = self._current
        try:
            yield
        except BaseException:
            if self._current is not before:
                for event in self._write():
                    log.warning("%s", event.message)
            raise

    def remove(self) -> None:
        """Delete the file: the video is finished."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self) -> Iterator[Warned]:
        """Write the current state once; a run is not lost if that fails."""
        assert self._path is not None
        assert self._current is not None
        if self._current is self._written:
            return
        try:
            self._current.save(self._path)
        except MlxSoraError as error:
            if not self._warned:
                yield Warned(f"{error} The run goes on without a checkpoint.")
            self._warned = True
        else:
            self._written = self._current


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON record alone, unchecked. Raises as `Snapshot.load`, or ValueError."""
    return parse_object(_metadata(path)["record"])


def _is_valid(record: Mapping[str, Any]) -> bool:
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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            found: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        check_file(path, f"Give a file NAME{CHECKPOINT_SUFFIX}.")
        reason = str(error).splitlines()[0][:120]
        raise WeightsError(f"The checkpoint {path} is damaged: {reason}.", _FIX) from error
    if not {"format", "record", "sha256"} <= found.keys():
        raise UsageError(
            f"{path} is not a checkpoint of a run.", f"Give a file NAME{CHECKPOINT_SUFFIX}."
        )
    return found


def _digest(record: str, arrays: Mapping[str, mx.array]) -> str:
    """Return the checksum of the record and all tensors; evaluates them."""
    found = hashlib.sha256(record.encode())
    for name in sorted(arrays):
        array = arrays[name]
        found.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        found.update(to_numpy(array.reshape(-1).view(mx.uint8)).data)
    return found.hexdigest()
