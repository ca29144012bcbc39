"""What an acceleration is to the pipeline: something that fills a seam in one run.

The seams are those of `sampling/base.py` and `models/context.py`. Whatever a technique does not
fill stays plain, so that techniques compose without knowing of each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from mlx_sora.models.context import TokenPolicy
from mlx_sora.sampling.base import StepPolicy
from mlx_sora.sampling.loop import StepResult


@dataclass(frozen=True)
class Job:
    """The run that a technique is asked for: its steps, velocity evaluations per step, and T."""

    steps: int
    evaluations: int
    frames: int


class Acceleration(ABC):
    """A technique at work in one run, and its account of it. By itself it changes nothing.

    warnings: what the user should know before the run, because it is not taken literally.
    """

    warnings: tuple[str, ...] = ()

    @property
    def policy(self) -> StepPolicy | None:
        """Says when to leap to the end."""
        return None

    def tokens(self, step: int) -> TokenPolicy | None:
        """The tokens that attend in step `step`."""
        return None

    @abstractmethod
    def watch(self, result: StepResult) -> None:
        """Look at a step that was made."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What it did, for the metadata: plain JSON values."""

    @abstractmethod
    def summary(self) -> str:
        """What it did, in a line for the user."""
