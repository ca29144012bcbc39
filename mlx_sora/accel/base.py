"""Base class of the accelerations: each fills one or more seams of a run.

The seams are the protocols of `sampling/base.py`, `sampling/guidance.py` and `models/hooks.py`. A
technique leaves the others as they are, so that techniques compose without knowing each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_sora.models.config import MAX_DEPTH
from mlx_sora.models.hooks import BlockStackCache, TokenMerging
from mlx_sora.sampling.base import LeapPolicy, State
from mlx_sora.sampling.guidance import CFGSlice, GuidancePolicy
from mlx_sora.sampling.loop import StepResult


@dataclass(frozen=True)
class ScheduleInfo:
    """The run that a technique is made for.

    evaluations: of the velocity per step. frames: latent frames. guided: whether CFG is on.
    times: flow time at the start of each step. model, model_name: its folder and name. size: width,
    height and frames of the video. skipped_steps, cond_only_steps: steps in which the techniques
    before this one run no block, or predict with the prompt only. blocks: of each kind in the
    network. first_step: the first that is made, which has nothing to reuse.
    agree: returns the decision of rank 0 on every rank; they may have rounded differently.
    agree_on_pass: the same for decisions about one forward pass, among the ranks that share it.
    """

    steps: int
    evaluations: int
    frames: int
    guided: bool = True
    times: tuple[float, ...] = ()
    model: Path | None = None
    model_name: str = ""
    size: tuple[int, int, int] = (0, 0, 0)
    skipped_steps: frozenset[int] = frozenset()
    cond_only_steps: frozenset[int] = frozenset()
    blocks: int = MAX_DEPTH
    first_step: int = 0
    agree: Callable[[bool], bool] = bool
    agree_on_pass: Callable[[bool], bool] = bool


class Acceleration(ABC):
    """One technique in one run: it decides, has a state, and accounts for what it did.

    warnings: shown before the run. skipped_steps, cond_only_steps: steps in which it runs no block,
    or predicts with the prompt only, as far as they are known before the run.
    cached_residuals: tensors of the size of one evaluation's tokens that it keeps.
    """

    warnings: tuple[str, ...] = ()
    skipped_steps: frozenset[int] = frozenset()
    cond_only_steps: frozenset[int] = frozenset()
    cached_residuals: float = 0

    @property
    def policy(self) -> LeapPolicy | None:
        """Policy that ends the run early."""
        return None

    @property
    def guidance(self) -> GuidancePolicy | None:
        """Policy that replaces unconditional predictions."""
        return None

    def token_merging(self, step: int) -> TokenMerging | None:
        """Return the token merging of this step."""
        return None

    def block_cache(self, step: int, cfg_slice: CFGSlice) -> BlockStackCache | None:
        """Return the cache for one forward pass of this step."""
        return None

    def state(self) -> State:
        """Return the state after a step: arrays and plain JSON values, in new containers."""
        return {}

    def restore(self, state: State, /) -> None:
        """Set the state that an interrupted run had."""
        assert not state, "a technique with a state overrides restore"

    def on_step_end(self, result: StepResult) -> None:
        """Account for a finished step."""
        return

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return what the technique did, as JSON values for the metadata."""

    @abstractmethod
    def summary(self) -> str:
        """Return what the technique did, in one line for the user."""
