"""TDTM, temporal dimension token merging: in early steps, pairs of frames attend as one.

Mirrors On-device Sora: frames 2k and 2k + 1 are averaged before every attention, and both receive
its result. Saves up to half of all work but the MLPs; merging in all steps takes motion away.
Dimension letters: B batch, T frames, S tokens per frame, C channels.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.models.hooks import TokenMerging
from mlx_sora.request.modes import ParsedMode
from mlx_sora.sampling.base import State
from mlx_sora.sampling.loop import StepResult


class PairedFrames:
    """Frame pairs as one; fills the seam TokenPolicy.

    An odd last frame sits out and receives a copy of the last pair's result, as in the reference
    (which fails for some lengths; here the rule holds for all). A single frame is left alone.
    """

    stride = 2

    def merge(self, x: mx.array) -> mx.array:
        """[B, T, S, C] to [B, T // 2, S, C]."""
        batch, frames, tokens, channels = x.shape
        if frames == 1:
            return x
        pairs = x[:, : frames // 2 * 2].reshape(batch, frames // 2, 2, tokens, channels)
        return (pairs[:, :, 0] + pairs[:, :, 1]) / 2

    def unmerge(self, x: mx.array, frames: int) -> mx.array:
        """[B, frames // 2, S, C] to [B, frames, S, C]."""
        if frames == 1:
            return x
        out = mx.repeat(x, 2, axis=1)
        return out if frames % 2 == 0 else mx.concatenate([out, x[:, -1:]], axis=1)


class MergedSteps(Acceleration):
    """Frames in pairs during the first `steps` steps of a run."""

    def __init__(self, steps: int, job: ScheduleInfo) -> None:
        self._steps, self._job = min(steps, job.steps), job
        self._made = 0
        if job.frames == 1:
            self._steps = 0
            self.warnings = ("--tdtm changes nothing here: a single frame has no other to merge.",)
        elif steps > job.steps:
            self.warnings = (f"--tdtm {steps} covers all of the {job.steps} steps.",)

    def token_merging(self, step: int) -> TokenMerging | None:
        return PairedFrames() if step < self._steps else None

    def on_step_end(self, result: StepResult) -> None:
        self._made += result.step.index < self._steps

    def state(self) -> State:
        return {"made": self._made}

    def restore(self, state: State, /) -> None:
        self._made = state["made"]

    def record(self) -> dict[str, Any]:
        """merged_steps; frames: latent frames; attending: how many attended in those steps."""
        frames = self._job.frames
        return {
            "merged_steps": self._made,
            "frames": frames,
            "attending": frames // 2 if self._made else frames,
        }

    def summary(self) -> str:
        frames, attending = self._job.frames, self._job.frames // 2
        if not self._made:
            return "tdtm: no frames merged"
        return (
            f"tdtm: {attending} instead of {frames} latent frames attended "
            f"in {self._made} of {self._job.steps} steps"
        )


def start(mode: ParsedMode, job: ScheduleInfo) -> MergedSteps:
    """What the option --tdtm asks for, unless it is off."""
    return MergedSteps(job.steps if mode.name == "all" else int(mode.values["steps"]), job)
