"""Accelerations: techniques that a request can ask for by name, composed for one run.

A new one is one file here that fills a seam, one line in ACCELERATIONS, its modes in
`mlx_sora.request.modes` and its field in `mlx_sora.request.generation`. Nothing else knows which
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_sora.accel import guidance_cache, guidance_interval, lpl, step_cache, tdtm
from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.models.hooks import BlockProvider, BlockStackCache, Hooks
from mlx_sora.models.stdit3 import BlockPair
from mlx_sora.request.modes import (
    GUIDANCE_CACHE,
    GUIDANCE_INTERVAL,
    LPL,
    STEP_CACHE,
    TDTM,
    Modes,
    ParsedMode,
)
from mlx_sora.sampling.base import LeapPolicy, State, Step
from mlx_sora.sampling.guidance import CFGPredictions, CFGSlice, GuidancePolicy
from mlx_sora.sampling.loop import StepResult

#: Field of the request: its modes, and what starts the technique in a mode other than off. Each
#: knows which steps those before it leave out.
ACCELERATIONS: dict[str, tuple[Modes, Callable[[ParsedMode, ScheduleInfo], Acceleration]]] = {
    "lpl": (LPL, lpl.start),
    "tdtm": (TDTM, tdtm.start),
    "step_cache": (STEP_CACHE, step_cache.start),
    "guidance_interval": (GUIDANCE_INTERVAL, guidance_interval.start),
    "guidance_cache": (GUIDANCE_CACHE, guidance_cache.start),
}

OFF = "off"


class Accelerations:
    """The techniques at work in one run, as one. With none, the run is the plain one."""

    def __init__(self, modes: Mapping[str, str], job: ScheduleInfo) -> None:
        """modes: field of the request to its value; those left out are off."""
        self._modes, self._job = dict(modes), job
        self._active: dict[str, Acceleration] = {}
        for name, (read, start) in ACCELERATIONS.items():
            mode = read.parse(modes.get(name, OFF))
            if mode.name != OFF:
                part = self._active[name] = start(mode, job)
                job = replace(
                    job,
                    skipped_steps=job.skipped_steps | part.skipped_steps,
                    cond_only_steps=job.cond_only_steps | part.cond_only_steps,
                )
        #: Steps in which no block runs, and only the half with prompt, as far as that is known.
        self.skipped_steps, self.cond_only_steps = job.skipped_steps, job.cond_only_steps

    def fresh_copy(self) -> Accelerations:
        """The same techniques for another run of the same kind, with nothing known of this one."""
        return Accelerations(self._modes, self._job)

    @property
    def warnings(self) -> list[str]:
        """What the user should know before the run."""
        return [warning for part in self._active.values() for warning in part.warnings]

    @property
    def policy(self) -> LeapPolicy | None:
        """Leap policy of the run; at most one technique has one."""
        policies = [part.policy for part in self._active.values() if part.policy is not None]
        assert len(policies) <= 1, "two techniques end the run"
        return policies[0] if policies else None

    @property
    def guidance(self) -> GuidancePolicy | None:
        """What says when the half without prompt is not run."""
        found = [part.guidance for part in self._active.values()]
        policies = [policy for policy in found if policy is not None]
        return _FirstOf(policies) if policies else None

    @property
    def cached_residuals(self) -> float:
        """Residual streams of an evaluation that are kept."""
        return sum(part.cached_residuals for part in self._active.values())

    def block_cache(self, step: int, part: CFGSlice) -> BlockStackCache | None:
        """What stands for the blocks in one call of the network, in step `step`."""
        found = [each.block_cache(step, part) for each in self._active.values()]
        policies = [policy for policy in found if policy is not None]
        assert len(policies) <= 1, "two techniques want to stand for the blocks"
        return policies[0] if policies else None

    def hooks(self, step: int, blocks: BlockProvider[BlockPair] | None = None) -> Hooks[BlockPair]:
        """What fills the network's seams in step `step`. blocks: None keeps the network's own."""
        found = [part.token_merging(step) for part in self._active.values()]
        tokens = [policy for policy in found if policy is not None]
        assert len(tokens) <= 1, "two techniques want to merge tokens"
        return Hooks(blocks, tokens[0]) if tokens else Hooks(blocks)

    def merges_tokens(self, step: int) -> bool:
        """Whether fewer tokens than all attend in step `step`: such steps need less memory."""
        return any(part.token_merging(step) is not None for part in self._active.values())

    def on_step_end(self, result: StepResult) -> None:
        """Show every technique a step that was made."""
        for part in self._active.values():
            part.on_step_end(result)

    def state(self) -> State:
        """Return the state of each technique by name; `denoise` saves that of the leap policy."""
        return {name: {} if t.policy else t.state() for name, t in self._active.items()}

    def restore(self, state: State) -> None:
        """Set the state that each technique had in an interrupted run."""
        for name, part in self._active.items():
            if part.policy is None:
                part.restore(state[name])

    def record(self) -> dict[str, Any]:
        """What each technique did, by name, for the metadata."""
        return {name: part.record() for name, part in self._active.items()}

    def summaries(self) -> list[str]:
        """What each technique did, a line each."""
        return [part.summary() for part in self._active.values()]


class _FirstOf:
    """The first of several policies of guidance that has anything to say; all see what is run."""

    def __init__(self, policies: list[GuidancePolicy]) -> None:
        self._policies = policies

    def predict_uncond(self, step: Step, /) -> Callable[[mx.array], mx.array] | None:
        for policy in self._policies:
            make = policy.predict_uncond(step)
            if make is not None:
                return make
        return None

    def update(self, step: Step, halves: CFGPredictions, /) -> None:
        for policy in self._policies:
            policy.update(step, halves)
