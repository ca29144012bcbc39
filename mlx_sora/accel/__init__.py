"""Accelerations: techniques that a request can ask for by name, composed for one run.

A new one is one file here that fills a seam, one line in ACCELERATIONS, its modes in
`mlx_sora.modes` and its field in `mlx_sora.request`. Nothing else knows which there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_sora.accel import lpl, tdtm
from mlx_sora.accel.base import Acceleration, Job
from mlx_sora.models.context import BlockProvider, Context
from mlx_sora.models.stdit3 import BlockPair
from mlx_sora.modes import LPL, TDTM, Chosen, Modes
from mlx_sora.sampling.base import AllSteps, StepPolicy
from mlx_sora.sampling.loop import StepResult

#: Field of the request: its modes, and what starts the technique in a mode other than off.
ACCELERATIONS: dict[str, tuple[Modes, Callable[[Chosen, Job], Acceleration]]] = {
    "lpl": (LPL, lpl.start),
    "tdtm": (TDTM, tdtm.start),
}

OFF = "off"


class Accelerations:
    """The techniques at work in one run, as one. With none, the run is the plain one."""

    def __init__(self, modes: Mapping[str, str], job: Job) -> None:
        """modes: field of the request to its value; those left out are off."""
        self._modes, self._job = dict(modes), job
        self._active: dict[str, Acceleration] = {}
        for name, (read, start) in ACCELERATIONS.items():
            mode = read.read(modes.get(name, OFF))
            if mode.name != OFF:
                self._active[name] = start(mode, job)

    def anew(self) -> Accelerations:
        """The same techniques for another run of the same kind, with nothing known of this one."""
        return Accelerations(self._modes, self._job)

    @property
    def warnings(self) -> list[str]:
        """What the user should know before the run."""
        return [warning for part in self._active.values() for warning in part.warnings]

    @property
    def policy(self) -> StepPolicy:
        """What says when to leap to the end; no two techniques do."""
        policies = [part.policy for part in self._active.values() if part.policy is not None]
        assert len(policies) <= 1, "two techniques want to end the run"
        return policies[0] if policies else AllSteps()

    def context(
        self, step: int, blocks: BlockProvider[BlockPair] | None = None
    ) -> Context[BlockPair]:
        """What fills the network's seams in step `step`. blocks: None keeps the network's own."""
        found = [part.tokens(step) for part in self._active.values()]
        tokens = [policy for policy in found if policy is not None]
        assert len(tokens) <= 1, "two techniques want to merge tokens"
        return Context(blocks, tokens[0]) if tokens else Context(blocks)

    def merges(self, step: int) -> bool:
        """Whether fewer tokens than all attend in step `step`: such steps need less memory."""
        return any(part.tokens(step) is not None for part in self._active.values())

    def watch(self, result: StepResult) -> None:
        """Show every technique a step that was made."""
        for part in self._active.values():
            part.watch(result)

    def record(self) -> dict[str, Any]:
        """What each technique did, by name, for the metadata."""
        return {name: part.record() for name, part in self._active.items()}

    def summaries(self) -> list[str]:
        """What each technique did, a line each."""
        return [part.summary() for part in self._active.values()]
