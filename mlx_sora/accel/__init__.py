"""Accelerations: the techniques of one run, made from their configs and composed.

A new technique is one file here that fills a seam, its config in `mlx_sora.request.techniques`, and
its field in `mlx_sora.request.generation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.distributed.group import Ranks
from mlx_sora.models.hooks import BlockProvider, BlockStackCache, Hooks, TokenMerging
from mlx_sora.models.stdit3 import BlockPair
from mlx_sora.request.techniques import OFF, TechniqueConfig
from mlx_sora.sampling.base import LeapPolicy, State, Step
from mlx_sora.sampling.guidance import CFGPredictions, CFGSlice, GuidancePolicy
from mlx_sora.sampling.loop import StepResult


class Accelerations:
    """All techniques of one run as one. Without any, they change nothing."""

    def __init__(
        self,
        configs: Mapping[str, TechniqueConfig | None],
        schedule: ScheduleInfo,
        windows: int = 1,
    ) -> None:
        """Make the techniques in the order of `configs`; each sees what those before leave out.

        configs: by option; None and mode "off" leave a technique out. windows: windows of the
        video; these are the techniques of the first, which also decides when all leap.
        """
        self._configs, self._schedule = dict(configs), schedule
        self._others = [Accelerations(configs, schedule) for _ in range(1, windows)]
        self._active: dict[str, Acceleration] = {}
        for name, config in configs.items():
            if config is None or config.mode == OFF:
                continue
            technique = self._active[name] = resolve_name(config.ACCELERATION)(config, schedule)
            schedule = replace(
                schedule,
                skipped_steps=schedule.skipped_steps | technique.skipped_steps,
                cond_only_steps=schedule.cond_only_steps | technique.cond_only_steps,
            )
        #: Steps in which no block runs, or only the prediction with prompt, as far as known.
        self.skipped_steps, self.cond_only_steps = schedule.skipped_steps, schedule.cond_only_steps

    def fresh_copy(self) -> Accelerations:
        """Return the same techniques in their initial state, for the next clip."""
        return Accelerations(self._configs, self._schedule, len(self.windows))

    @property
    def windows(self) -> list[Accelerations]:
        """Techniques of each window."""
        return [self, *self._others]

    @property
    def warnings(self) -> list[str]:
        """Warnings to show before the run."""
        return [warning for each in self._active.values() for warning in each.warnings]

    @property
    def policy(self) -> LeapPolicy | None:
        """Leap policy of the run; at most one technique has one."""
        policies = [each.policy for each in self._active.values() if each.policy is not None]
        assert len(policies) <= 1, "two techniques end the run"
        return policies[0] if policies else None

    @property
    def guidance(self) -> GuidancePolicy | None:
        """Policy that replaces unconditional predictions."""
        policies = [each.guidance for each in self._active.values() if each.guidance is not None]
        return _FirstOf(policies) if policies else None

    @property
    def cached_residuals(self) -> float:
        """Tensors of the size of one evaluation's tokens that are kept between steps."""
        own = sum(each.cached_residuals for each in self._active.values())
        return own * len(self.windows)

    def block_cache(self, step: int, cfg_slice: CFGSlice) -> BlockStackCache | None:
        """Return the cache that may replace the block stack in this forward pass, or None."""
        found = [each.block_cache(step, cfg_slice) for each in self._active.values()]
        caches = [cache for cache in found if cache is not None]
        assert len(caches) <= 1, "two techniques replace the block stack"
        return caches[0] if caches else None

    def hooks(self, step: int, blocks: BlockProvider[BlockPair] | None = None) -> Hooks[BlockPair]:
        """Return the hooks of the network for this step. blocks: None uses the network's own."""
        merging = self.token_merging(step)
        return Hooks(blocks, merging) if merging else Hooks(blocks)

    def token_merging(self, step: int) -> TokenMerging | None:
        """Return the token merging of this step; such steps need less memory."""
        found = [each.token_merging(step) for each in self._active.values()]
        merging = [each for each in found if each is not None]
        assert len(merging) <= 1, "two techniques merge tokens"
        return merging[0] if merging else None

    def merged_sites(self, step: int) -> tuple[tuple[str, ...], ...]:
        """Return the sites that merge in this step, by block; empty if none does."""
        merging = self.token_merging(step)
        return tuple(map(merging.sites_of, range(self._schedule.blocks))) if merging else ()

    def on_step_end(self, result: StepResult) -> None:
        """Let every technique account for a finished step."""
        for window in self.windows:
            for each in window._active.values():
                each.on_step_end(result)

    def state(self) -> State:
        """Return the state of each technique by name; `denoise` saves that of the leap policy."""
        windows = [each._own_state() for each in self._others]
        return {**self._own_state(), **({"windows": windows} if windows else {})}

    def restore(self, state: State) -> None:
        """Set the state that each technique had in an interrupted run."""
        saved = [state, *state.get("windows", ())]
        for window, own in zip(self.windows, saved, strict=True):
            window._restore_own(own)

    def share_windows(self, ranks: Ranks) -> None:
        """Set the state of each window to that of the rank which evaluates it, on all ranks."""
        for index, window in enumerate(self.windows):
            root = index % ranks.size
            window._restore_own(ranks.broadcast_state(window._own_state(), root))

    def _own_state(self) -> State:
        return {
            name: each.state() if each.policy is None else {} for name, each in self._active.items()
        }

    def _restore_own(self, state: State) -> None:
        for name, each in self._active.items():
            if each.policy is None:
                each.restore(state[name])

    def record(self) -> dict[str, Any]:
        """Return what each technique did, by name, for the metadata; of windows as a list."""
        found: dict[str, Any] = {}
        for name, each in self._active.items():
            records = [window._active[name].record() for window in self.windows]
            found[name] = records[0] if each.policy is not None or not self._others else records
        return found

    def summaries(self) -> list[str]:
        """Return what each technique did, in one line each, or one for each way of windows."""
        return [
            line
            for name, each in self._active.items()
            for line in dict.fromkeys(
                window._active[name].summary()
                for window in (self.windows if each.policy is None else [self])
            )
        ]


class _FirstOf:
    """Guidance policy of several: the first that replaces a prediction wins."""

    def __init__(self, policies: list[GuidancePolicy]) -> None:
        self._policies = policies

    def predict_uncond(self, step: Step, /) -> Callable[[mx.array], mx.array] | None:
        found = (policy.predict_uncond(step) for policy in self._policies)
        return next((predict for predict in found if predict is not None), None)

    def update(self, step: Step, predictions: CFGPredictions, /) -> None:
        for policy in self._policies:
            policy.update(step, predictions)
