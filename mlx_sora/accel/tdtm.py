"""TDTM, temporal dimension token merging: in some steps, pairs of frames count as one.

Without sites it mirrors On-device Sora: frames 2k and 2k + 1 are averaged before every attention,
and both receive its result. That saves up to half of all work except the MLPs, and reduces motion.
With sites, only some parts of the blocks see merged frames, at their true positions in time.
Dimension letters: B batch, T frames, S tokens per frame, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.accel.merging_table import read_merging
from mlx_sora.models.hooks import NoMerging, SiteMerging, TokenMerging
from mlx_sora.request.techniques import PAPER_SITES, SITES, Tdtm
from mlx_sora.sampling.base import State
from mlx_sora.sampling.loop import StepResult


class PairedFrames:
    """Merging of frame pairs in every attention. Fills TokenMerging and SiteMerging.

    An odd last frame does not attend and receives a copy of the last pair's result, as in the
    reference (which fails for some lengths; here every length works). A single frame stays as is.
    Merged frames have positions 0 to T' - 1.
    """

    stride = 2

    def sites_of(self, block: int) -> tuple[str, ...]:
        """Return the sites of every attention."""
        return PAPER_SITES

    def at(self, block: int, site: str) -> SiteMerging:
        """Return this merging for every attention, none for the rest of a block."""
        return self if site in PAPER_SITES else NoMerging()

    def positions(self, frames: int) -> mx.array | None:
        """Return None: the positions of the shorter sequence."""
        return None

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


class FramePairs:
    """Merging of frame pairs at one site. Fills SiteMerging. An odd last frame stays as it is."""

    def merge(self, x: mx.array) -> mx.array:
        """Average pairs: [B, T, S, C] to [B, ceil(T / 2), S, C]."""
        frames = x.shape[1]
        if frames == 1:
            return x
        pairs = (x[:, 0 : frames - 1 : 2] + x[:, 1::2]) / 2
        return pairs if frames % 2 == 0 else mx.concatenate([pairs, x[:, -1:]], axis=1)

    def unmerge(self, x: mx.array, frames: int) -> mx.array:
        """Repeat pairs: [B, ceil(frames / 2), S, C] to [B, frames, S, C]."""
        return x if frames == 1 else mx.repeat(x, 2, axis=1)[:, :frames]

    def positions(self, frames: int) -> mx.array:
        """Return the middle of each pair: 0.5, 2.5, ..., and the position of an odd last frame."""
        first = mx.arange(0, frames, 2)
        return (first + mx.minimum(first + 1, frames - 1)) / 2


@dataclass(frozen=True)
class MergedSites:
    """Merging of frame pairs at some sites of some blocks. Fills TokenMerging."""

    sites: tuple[str, ...]
    blocks: range

    stride = 2

    def sites_of(self, block: int) -> tuple[str, ...]:
        """Return the sites of block `block` that merge."""
        return self.sites if block in self.blocks else ()

    def at(self, block: int, site: str) -> SiteMerging:
        """Return the merging at one site of block `block`."""
        return FramePairs() if site in self.sites_of(block) else NoMerging()


@dataclass(frozen=True)
class MergedBlocks:
    """Merging of frame pairs at sites that differ by block. Fills TokenMerging."""

    sites: tuple[tuple[str, ...], ...]

    stride = 2

    def sites_of(self, block: int) -> tuple[str, ...]:
        """Return the sites of block `block` that merge."""
        return self.sites[block]

    def at(self, block: int, site: str) -> SiteMerging:
        """Return the merging at one site of block `block`."""
        return FramePairs() if site in self.sites[block] else NoMerging()


class MergedSteps(Acceleration):
    """Merging of frame pairs in some steps of one run."""

    def __init__(self, config: Tdtm, schedule: ScheduleInfo) -> None:
        self._config, self._schedule = config, schedule
        self._merging: dict[int, TokenMerging] = {}
        self._merged_steps = 0
        if schedule.frames == 1:
            self.warnings = ("--tdtm changes nothing here: a single frame has no other to merge.",)
            return
        if config.mode == "table":
            found = read_merging(config.speed, schedule, config.file)
            self._merging |= {step: MergedBlocks(sites) for step, sites in found.items()}
            return
        steps = _merged_steps(config, schedule)
        if config.merged_sites and config.merged_blocks.start >= schedule.blocks:
            own = f"0-{schedule.blocks - 1}"
            self.warnings = (f"--tdtm {config} merges nothing: the model's blocks are {own}.",)
            return
        sites = config.merged_sites
        merging = MergedSites(sites, config.merged_blocks) if sites else PairedFrames()
        self._merging |= dict.fromkeys(steps, merging)
        if not steps:
            self.warnings = (f"--tdtm {config} merges nothing: no step begins there.",)
        elif config.mode in ("", "last") and config.steps > schedule.steps:
            self.warnings = (f"--tdtm {config} covers all of the {schedule.steps} steps.",)

    def token_merging(self, step: int) -> TokenMerging | None:
        return self._merging.get(step)

    def on_step_end(self, result: StepResult) -> None:
        self._merged_steps += result.step.index in self._merging

    def state(self) -> State:
        return {"made": self._merged_steps}

    def restore(self, state: State, /) -> None:
        self._merged_steps = state["made"]

    def record(self) -> dict[str, Any]:
        """Return merged_steps; frames: latent frames; attending: of them, in those steps.

        With sites, these in place of attending.
        """
        frames, sites = self._schedule.frames, self._sites
        done = {"merged_steps": self._merged_steps, "frames": frames}
        if sites:
            return done | {"sites": list(sites)}
        return done | {"attending": frames // 2 if self._merged_steps else frames}

    @property
    def _sites(self) -> tuple[str, ...]:
        """Sites that were asked for or that the table names; none for every attention."""
        if self._config.mode != "table":
            return self._config.merged_sites
        blocks = range(self._schedule.blocks)
        found = {s for each in self._merging.values() for b in blocks for s in each.sites_of(b)}
        return tuple(site for site in SITES if site in found)

    def summary(self) -> str:
        frames, sites = self._schedule.frames, self._sites
        if not self._merged_steps:
            return "tdtm: no frames merged"
        count = f"in {self._merged_steps} of {self._schedule.steps} steps"
        if sites:
            return f"tdtm: frame pairs merged ({' + '.join(sites)}) {count}"
        return f"tdtm: {frames // 2} instead of {frames} latent frames attended {count}"


def _merged_steps(config: Tdtm, schedule: ScheduleInfo) -> frozenset[int]:
    """Return the steps that merge; a range of flow times selects steps by their start."""
    steps = range(schedule.steps)
    if config.mode == "between":
        return frozenset(i for i in steps if config.low <= schedule.times[i] <= config.high)
    if config.mode == "last":
        return frozenset(steps[-config.steps :])
    return frozenset(steps if config.mode == "all" else steps[: config.steps])
