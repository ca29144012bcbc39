"""TDTM, temporal dimension token merging: in early steps, pairs of frames attend as one.

Mirrors On-device Sora: frames 2k and 2k + 1 are averaged before every attention, and both receive
its result. Saves up to half of all work except the MLPs. Merging in all steps reduces motion.
Dimension letters: B batch, T frames, S tokens per frame, C channels.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.models.hooks import TokenMerging
from mlx_sora.request.techniques import Tdtm
from mlx_sora.sampling.base import State
from mlx_sora.sampling.loop import StepResult


class PairedFrames:
    """Merging of frame pairs. Fills TokenMerging.

    An odd last frame does not attend and receives a copy of the last pair's result, as in the
    reference (which fails for some lengths; here every length works). A single frame stays as is.
    """

    stride = 2

    def merge(self, x: mx.array) -> mx.array:
        """Average pairs: [B, T, S, C] to [B, T // 2, S, C]."""
        batch, frames, tokens, channels = x.shape
        if frames == 1:
            return x
        pairs = x[:, : frames // 2 * 2].reshape(batch, frames // 2, 2, tokens, channels)
        return (pairs[:, :, 0] + pairs[:, :, 1]) / 2

    def unmerge(self, x: mx.array, frames: int) -> mx.array:
        """Repeat pairs: [B, frames // 2, S, C] to [B, frames, S, C]."""
        if frames == 1:
            return x
        out = mx.repeat(x, 2, axis=1)
        return out if frames % 2 == 0 else mx.concatenate([out, x[:, -1:]], axis=1)


class MergedSteps(Acceleration):
    """Merging of frame pairs in the first steps of one run."""

    def __init__(self, config: Tdtm, schedule: ScheduleInfo) -> None:
        self._schedule = schedule
        self._steps = schedule.steps if config.mode == "all" else min(config.steps, schedule.steps)
        self._merged_steps = 0
        if schedule.frames == 1:
            self._steps = 0
            self.warnings = ("--tdtm changes nothing here: a single frame has no other to merge.",)
        elif config.mode != "all" and config.steps > schedule.steps:
            self.warnings = (f"--tdtm {config} covers all of the {schedule.steps} steps.",)

    def token_merging(self, step: int) -> TokenMerging | None:
        return PairedFrames() if step < self._steps else None

    def on_step_end(self, result: StepResult) -> None:
        self._merged_steps += result.step.index < self._steps

    def state(self) -> State:
        return {"made": self._merged_steps}

    def restore(self, state: State, /) -> None:
        self._merged_steps = state["made"]

    def record(self) -> dict[str, Any]:
        """Return merged_steps; frames: latent frames; attending: of them, in those steps."""
        frames = self._schedule.frames
        return {
            "merged_steps": self._merged_steps,
            "frames": frames,
            "attending": frames // 2 if self._merged_steps else frames,
        }

    def summary(self) -> str:
        frames = self._schedule.frames
        if not self._merged_steps:
            return "tdtm: no frames merged"
        return (
            f"tdtm: {frames // 2} instead of {frames} latent frames attended "
            f"in {self._merged_steps} of {self._schedule.steps} steps"
        )
