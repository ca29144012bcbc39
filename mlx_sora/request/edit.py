"""EditRequest: a video, a prompt that describes it, and a prompt for the edited video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mlx_sora.errors import UsageError
from mlx_sora.request.generation import (
    GenerationRequest,
    keyword_errors,
    options,
    options_of,
)
from mlx_sora.request.options import as_int, as_medium, as_text

#: Default number of first steps that use the source's values: measured on the bundled model
#: (benchmarks/editing.py).
INJECT_STEPS = 2

#: Default sampler. Inverting a video needs one that is exact both ways.
SAMPLER = "midpoint"


@dataclass(frozen=True)
class EditRequest:
    """One edit.

    video: path of a video or an image, or its `Pixels`. source_prompt: describes it.
    target: the prompt for the edited video, and every other option. An open size is the model's,
    an open length and frame rate are the video's.
    inject_steps: number of first steps in which spatial attention uses the values of the source;
    None: INJECT_STEPS, or all steps if there are fewer.

    The constructor converts values to the types of the fields. Raises UsageError.
    """

    video: str
    source_prompt: str
    target: GenerationRequest = field(default_factory=GenerationRequest)
    inject_steps: int | None = None

    @keyword_errors()
    def __post_init__(self) -> None:
        readers = {"video": as_medium, "source_prompt": as_text, "inject_steps": as_int}
        for name, read in readers.items():
            value = getattr(self, name)
            if value is None and name == "inject_steps":
                continue
            try:
                object.__setattr__(self, name, read(value))
            except ValueError as error:
                shown = str(value)[:80]
                raise UsageError(f"{name} must be {error}, not {shown!r}.") from None

    @classmethod
    @keyword_errors()
    def from_options(cls, video: Any, values: Mapping[str, Any]) -> EditRequest:
        """Return an edit from its own options and those that it shares with a generation.

        The sampler is SAMPLER unless `values` has one. Raises UsageError.
        """
        own_names = {f.name for f in fields(cls)} - {"video", "target"}
        own = {name: value for name, value in values.items() if name in own_names}
        target = {name: value for name, value in values.items() if name not in own_names}
        shared = options_of("edit")
        unknown = [name for name in target if name not in shared]
        if unknown:
            raise UsageError(
                f"An edit has no option {str(unknown[0])[:80]!r}.",
                f"Valid: {', '.join((*sorted(own_names), *shared))}.",
            )
        if "source_prompt" not in own:
            raise UsageError("source_prompt is missing.", "Describe the video in it.")
        request = GenerationRequest.from_dict({"sampler": SAMPLER, **target})
        return cls(video, target=request, **own)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditRequest:
        """Return the edit of `to_dict`."""
        return cls(**{**values, "target": GenerationRequest.from_dict(values["target"])})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return own | {"target": self.target.to_dict()}

    @property
    def single_process(self) -> bool:
        """True if no other rank takes part."""
        return self.target.parallel == "off"

    @keyword_errors()
    def validate(self) -> None:
        """Raise UsageError for a value that no model supports."""
        if not self.source_prompt.strip():
            raise UsageError("the source prompt is empty.", "Describe the video: --source-prompt.")
        self.target.validate()
        for name, option in options().items():
            if "edit" not in option.tasks and getattr(self.target, name) != option.default:
                raise UsageError(f"An edit does not use {option.label}.", "Leave it out.")

    def resolved_inject_steps(self, steps: int) -> int:
        """Return `inject_steps` for a run of `steps` steps. Raises UsageError."""
        if self.inject_steps is None:
            return min(INJECT_STEPS, steps)
        if not 0 <= self.inject_steps <= steps:
            raise UsageError(
                f"--inject-steps {self.inject_steps} is out of range.", f"Give 0 to {steps}."
            )
        return self.inject_steps

    def resolved_target(self, num_frames: int, fps: float) -> GenerationRequest:
        """Return the target with the length and the frame rate of the video where it has none.

        The seed is 0: an edit uses no random numbers.
        """
        target = replace(self.target, seed=0)
        if target.num_frames is None:
            target = replace(target, num_frames=num_frames)
        return replace(target, fps=fps) if target.fps is None else target
