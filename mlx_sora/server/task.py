"""Tasks that clients send, their plans, and the errors that the server adds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mlx_sora.errors import MlxSoraError, UsageError

#: Kinds of tasks, as the commands that carry them out.
GENERATE, EDIT = "generate", "edit"
KINDS = (GENERATE, EDIT)

#: Crockford's alphabet for identifiers.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


class NotFoundError(MlxSoraError):
    """No job or upload has this identifier."""

    exit_code = 2


class QueueFullError(MlxSoraError):
    """As many jobs wait as the server takes."""


class ConflictError(UsageError):
    """A job in a state that does not allow what is to be done with it."""


def new_id(prefix: str) -> str:
    """Return an identifier: prefix and 26 characters, of microseconds and 76 random bits."""
    number = time.time_ns() // 1000 << 76 | int.from_bytes(os.urandom(10), "big") >> 4
    return prefix + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


@dataclass(frozen=True)
class Task:
    """One video to make.

    kind: generate or edit. options: JSON values of GenerationRequest's fields, for an edit also
    video, source_prompt and inject_steps. Images and videos are named by the identifiers of uploads
    ("file-...") or of jobs ("video_..."); `output` is a format, such as mp4.
    """

    kind: str = GENERATE
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        """Return the task of `to_dict`."""
        return cls(values["kind"], dict(values["options"]))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"kind": self.kind, "options": dict(self.options)}

    @property
    def prompt(self) -> str:
        """Text prompt."""
        return str(self.options.get("prompt", ""))


def with_changes(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with some changed; None takes one out, a size replaces the other way."""
    ways = {"width", "height"}, {"resolution", "aspect_ratio"}
    found = dict(options)
    for new, old in (ways, ways[::-1]):
        if any(changes.get(name) is not None for name in new):
            found = {name: value for name, value in found.items() if name not in old}
    return {n: value for n, value in (found | dict(changes)).items() if value is not None}


@dataclass(frozen=True)
class PlanSummary:
    """Needs of a task. Memory in bytes.

    peak: of the process. smallest: the least budget that would do. capacity: what the machine has
    for one process. seconds: None before `doctor --machine`. fits: False if no budget of this
    machine does; `error` and `fix` then say why, `suggestions` are options that would fit.
    budget: bytes that the run has to keep to, as its peak without one is above capacity. shares:
    share of the operations of each stage. notes: how media are fitted. suffix: of the file.
    previews: the model can show them cheaply. in_ram: the memory is that of the machine, not of a
    GPU with its own.
    """

    model: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    fps: float = 0.0
    steps: int = 0
    peak: int = 0
    smallest: int = 0
    capacity: int = 0
    budget: int | None = None
    seconds: float | None = None
    fits: bool = True
    error: str = ""
    fix: str = ""
    suggestions: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    suffix: str = ""
    previews: bool = False
    in_ram: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlanSummary:
        """Return the plan of `to_dict`; unknown keys of a later version are left out."""
        known = {f.name for f in fields(cls)}
        found = {name: value for name, value in values.items() if name in known}
        for name in ("suggestions", "warnings", "notes"):
            found[name] = tuple(found.get(name, ()))
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"video_seconds": self.video_seconds}

    @property
    def needed(self) -> int:
        """Bytes that the run takes when it may take what it likes."""
        return self.peak if self.budget is None else min(self.peak, self.budget)

    @property
    def video_seconds(self) -> float:
        """Seconds of the video."""
        return round(self.frames / self.fps, 3) if self.fps else 0.0


@dataclass(frozen=True)
class Upload:
    """A picture or video from a client. request: the options in its record, if mlx_sora made it."""

    id: str
    kind: str
    width: int
    height: int
    frames: int
    fps: float | None
    name: str = ""
    created_at: float = 0.0
    request: Mapping[str, Any] | None = None
