"""What an acceleration is to the pipeline: something that fills a seam in one run.

The seams are those of `sampling/base.py`, `sampling/guidance.py` and `models/hooks.py`. Whatever
a technique does not fill stays plain, so that techniques compose without knowing of each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_sora.models.hooks import BlockStackCache, TokenMerging
from mlx_sora.sampling.base import LeapPolicy, State
from mlx_sora.sampling.guidance import CFGSlice, GuidancePolicy
from mlx_sora.sampling.loop import StepResult


@dataclass(frozen=True)
class ScheduleInfo:
    """The run that a technique is asked for: its steps, velocity evaluations per step, and T.

    guided: with and without prompt. times: flow time at the start of each step. model, size: the
    model's folder, and width, height and frames of the video, for what was measured beforehand.
    skipped, alone: steps in which other techniques run no block, and only the half with prompt.
    agree: what the first of the processes that make the video together has decided; another may
    have rounded otherwise.
    """

    steps: int
    evaluations: int
    frames: int
    guided: bool = True
    times: tuple[float, ...] = ()
    model: Path | None = None
    size: tuple[int, int, int] = (0, 0, 0)
    skipped_steps: frozenset[int] = frozenset()
    cond_only_steps: frozenset[int] = frozenset()
    agree: Callable[[bool], bool] = bool


class Acceleration(ABC):
    """A technique at work in one run, and its account of it. By itself it changes nothing.

    warnings: what the user should know before the run, because it is not taken literally.
    skipped, alone: steps in which it has no block run, or only the half with prompt, as far as
    that is known before the run. tensors: residual streams of an evaluation that it keeps.
    """

    warnings: tuple[str, ...] = ()
    skipped_steps: frozenset[int] = frozenset()
    cond_only_steps: frozenset[int] = frozenset()
    cached_residuals: float = 0

    @property
    def policy(self) -> LeapPolicy | None:
        """Policy that ends the run early, if the technique has one."""
        return None

    @property
    def guidance(self) -> GuidancePolicy | None:
        """Says when the half without prompt is not run."""
        return None

    def token_merging(self, step: int) -> TokenMerging | None:
        """The tokens that attend in step `step`."""
        return None

    def block_cache(self, step: int, part: CFGSlice) -> BlockStackCache | None:
        """What stands for the blocks in one call of the network, in step `step`."""
        return None

    def state(self) -> State:
        """Return the state after a step: arrays and plain JSON values, in new containers."""
        return {}

    def restore(self, state: State, /) -> None:
        """Set the state that an interrupted run had."""
        assert not state, "a technique with a state overrides restore"

    @abstractmethod
    def on_step_end(self, result: StepResult) -> None:
        """Look at a step that was made."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What it did, for the metadata: plain JSON values."""

    @abstractmethod
    def summary(self) -> str:
        """What it did, in a line for the user."""
