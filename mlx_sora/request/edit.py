"""What a user can ask of an edit: a video, what it shows, what it is to show instead."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mlx_sora.errors import UsageError
from mlx_sora.request.generation import GenerationRequest, label
from mlx_sora.request.options import as_int, as_path, as_text

#: For how many of the first steps the source's values are used, unless told otherwise: measured on
#: the bundled model (benchmarks/editing.py).
INJECT_STEPS = 2

#: How the flow is followed unless told otherwise: the way back has to be exact.
SAMPLER = "midpoint"

#: Options of a generation that mean the same in an edit; the others have no place there.
SHARED = (
    *("prompt", "negative_prompt", "model", "steps", "guidance", "sequential_guidance", "sampler"),
    *("resolution", "aspect_ratio", "width", "height", "num_frames", "fps"),
    *("aesthetic", "motion", "camera", "lpl", "tdtm", "dtype", "quantize"),
    *("quantize", "memory_budget", "device_profile", "ci_dl", "vae_tiles", "parallel"),
    *("output", "overwrite", "embed_metadata", "metadata", "health_check"),
)


@dataclass(frozen=True)
class EditRequest:
    """One edit. video: path of a video or picture. source_prompt: what it shows.

    target: the prompt for what it is to show, and every other option. Size, length and fps that it
    leaves open are the model's size and the video's own length and fps. inject_steps: in how many
    of the first steps attention within frames uses the values of the source; None means
    INJECT_STEPS, or as many steps as there are. Values are brought to their type on construction
    (UsageError).
    """

    video: str
    source_prompt: str
    target: GenerationRequest = field(default_factory=GenerationRequest)
    inject_steps: int | None = None

    def __post_init__(self) -> None:
        readers = {"video": as_path, "source_prompt": as_text, "inject_steps": as_int}
        for name, read in readers.items():
            value = getattr(self, name)
            if value is None and name == "inject_steps":
                continue
            try:
                object.__setattr__(self, name, read(value))
            except ValueError as error:
                given = str(value)[:80]
                raise UsageError(f"{name} must be {error}, not {given!r}.") from None

    @classmethod
    def of(cls, video: str | os.PathLike[str], options: Mapping[str, Any]) -> EditRequest:
        """From keywords: those of an edit, and those that it shares with a generation.

        Without a sampler among them it is SAMPLER.
        """
        own = {f.name for f in fields(cls)} - {"video", "target"}
        rest = {name: value for name, value in options.items() if name not in own}
        strange = [name for name in rest if name not in SHARED]
        if strange:
            raise UsageError(
                f"An edit has no option {str(strange[0])[:80]!r}.",
                f"Valid: {', '.join((*sorted(own), *SHARED))}.",
            )
        given = {name: value for name, value in options.items() if name in own}
        if "source_prompt" not in given:
            raise UsageError("source_prompt is missing.", "Say what the video shows.")
        target = GenerationRequest.from_dict({"sampler": SAMPLER, **rest})
        return cls(os.fspath(video), target=target, **given)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditRequest:
        """What `to_dict` told."""
        return cls(**{**values, "target": GenerationRequest.from_dict(values["target"])})

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return own | {"target": self.target.to_dict()}

    @property
    def single_process(self) -> bool:
        """Whether it leaves nothing to other ranks."""
        return self.target.parallel == "off"

    def validate(self) -> None:
        """Raise UsageError for a value that no model can serve."""
        if not self.source_prompt.strip():
            raise UsageError("the source prompt is empty.", "Say in --source-prompt what is shown.")
        self.target.validate()
        default = GenerationRequest()
        for item in fields(GenerationRequest):
            name = item.name
            if name not in SHARED and getattr(self.target, name) != getattr(default, name):
                raise UsageError(f"{label(name)} has no place in an edit.", "Leave it out.")

    def resolved_inject_steps(self, steps: int) -> int:
        """In how many of `steps` steps values are shared. Raises UsageError."""
        if self.inject_steps is None:
            return min(INJECT_STEPS, steps)
        if not 0 <= self.inject_steps <= steps:
            raise UsageError(
                f"--inject-steps {self.inject_steps} is out of range.", f"Give 0 to {steps}."
            )
        return self.inject_steps

    def resolved_target(self, num_frames: int, fps: float) -> GenerationRequest:
        """The target with what it leaves open of a video with so many frames. Raises UsageError.

        The seed is 0: an edit draws no random numbers.
        """
        target = replace(self.target, seed=0)
        if target.num_frames is None:
            target = replace(target, num_frames=num_frames)
        return replace(target, fps=fps) if target.fps is None else target
