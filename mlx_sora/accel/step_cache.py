"""Step cache: skip the transformer blocks in some steps and reuse their cached residual.

The residual of the block stack (out - in) changes little from step to step, so one tensor replaces
all blocks (as in MagCache, GCache and EasyCache). The steps that run the blocks follow from a fixed
schedule, from a table searched on the model itself (`accel/schedules.py`), or from the change of
the tokens during the run. Instead of the last residual, a line through the last two over flow time
can be used (order 1, as in TaylorSeer).
Dimension letters: B batch, T frames, S tokens per frame, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.accel.schedules import read_schedule
from mlx_sora.request.techniques import StepCache
from mlx_sora.sampling.base import State
from mlx_sora.sampling.guidance import CFGSlice


class CacheRule(Protocol):
    """Decides which evaluations reuse the residual. It sees the first sample, [1, T, S, C]."""

    #: Steps that are known to run no block.
    skipped_steps: frozenset[int]

    #: Tensors [1, T, S, C] that the rule itself keeps.
    cached_tensors: int

    def should_reuse(self, step: int, x: mx.array) -> bool:
        """Return whether to skip the blocks for tokens x; called once per evaluation."""

    def update(self, x: mx.array, out: mx.array) -> None:
        """Take the tokens before and after the blocks, where they ran."""

    def state(self) -> State:
        """Return the state after a step, in new containers."""

    def restore(self, state: State, /) -> None:
        """Set the state that an interrupted run had."""


class ScheduledRule:
    """Rule that runs the blocks in the steps of a schedule."""

    cached_tensors = 0

    def __init__(self, computed: frozenset[int], steps: int) -> None:
        self.skipped_steps = frozenset(range(steps)) - computed

    def should_reuse(self, step: int, x: mx.array) -> bool:
        return step in self.skipped_steps

    def update(self, x: mx.array, out: mx.array) -> None:
        """Do nothing: the schedule is fixed."""

    def state(self) -> State:
        return {}

    def restore(self, state: State, /) -> None:
        """Do nothing: the schedule is fixed."""


class OnlineRule:
    """Rule that measures how much the tokens change; NaviCache's, close to EasyCache's.

    The change of the output is estimated as the change of the tokens times the ratio of both, which
    is measured whenever the blocks run. They run once the estimates since the last time add up to
    `threshold` of the output, and always in the first `warmup` steps and in the last step.
    """

    skipped_steps: frozenset[int] = frozenset()
    cached_tensors = 3

    #: Weight of a new measurement of the ratio: the settled gain of NaviCache's filter.
    GAIN = 0.618

    def __init__(self, threshold: float, warmup: int, steps: int) -> None:
        self._threshold, self._warmup, self._last_step = threshold, warmup, steps - 1
        self._x_last: mx.array | None = None
        self._computed: tuple[mx.array, mx.array] | None = None
        self._ratio: float | None = None
        self._level = 1.0
        self._error = 0.0
        self._step = 0

    def should_reuse(self, step: int, x: mx.array) -> bool:
        x_last, self._x_last, self._step = self._x_last, _copy(x), step
        if x_last is None or self._ratio is None:
            return False
        self._error += self._ratio * _distance(x, x_last) / self._level
        return self._warmup <= step < self._last_step and self._error < self._threshold

    def update(self, x: mx.array, out: mx.array) -> None:
        self._error = 0.0
        last, self._computed = self._computed, (_copy(x), _copy(out))
        self._level = max(_size(out), 1e-12)
        if last is None:
            return
        change = _distance(x, last[0])
        if change <= 0:
            return
        ratio = _distance(out, last[1]) / change
        is_settled = self._ratio is not None and self._step >= self._warmup
        gain = self.GAIN if is_settled else 1.0
        self._ratio = ratio if self._ratio is None else self._ratio + gain * (ratio - self._ratio)

    def state(self) -> State:
        return {
            "before": self._x_last,
            "computed": None if self._computed is None else list(self._computed),
            "ratio": self._ratio,
            "level": self._level,
            "error": self._error,
        }

    def restore(self, state: State, /) -> None:
        self._x_last, self._ratio = state["before"], state["ratio"]
        self._level, self._error = state["level"], state["error"]
        self._computed = None if state["computed"] is None else tuple(state["computed"])


@dataclass
class CachedSample:
    """Residuals of one sample, [1, T, S, C], with their flow times t [1]; the newest last.

    evaluation: number of the evaluation that computed the newest. mask [1, T]: frames that moved.
    """

    residuals: list[tuple[mx.array, mx.array]] = field(default_factory=list)
    evaluation: int = -1
    mask: mx.array | None = None

    def extrapolate(self, t: mx.array) -> mx.array:
        """Return the line through the last two residuals at flow time t [1], or the only one."""
        newest, t_newest = self.residuals[-1]
        if len(self.residuals) == 1:
            return newest
        older, t_older = self.residuals[-2]
        dt = t_newest - t_older
        # Two evaluations at one time (a step of length 0) have no slope.
        weight = mx.where(dt == 0, 0, (t - t_newest) / mx.where(dt == 0, 1, dt))
        return newest + (newest - older) * weight.reshape(-1, 1, 1, 1)

    def state(self) -> State:
        return {
            "sums": [{"sum": residual, "t": t} for residual, t in self.residuals],
            "evaluation": self.evaluation,
            "mask": self.mask,
        }

    @classmethod
    def from_state(cls, state: State) -> CachedSample:
        residuals = [(item["sum"], item["t"]) for item in state["sums"]]
        return cls(residuals, state["evaluation"], state["mask"])


class ResidualCache(Acceleration):
    """Cached residuals of the block stack in one run.

    The blocks run whatever the rule says if a sample's frame mask has changed, or if its residual
    is older than that of the first sample. A batch follows its first sample.
    """

    def __init__(self, config: StepCache, schedule: ScheduleInfo) -> None:
        self.rule = make_rule(config, schedule)
        self._order, self._agree = config.order, schedule.agree_on_pass
        self._samples: dict[int, CachedSample] = {}
        self._evaluations = self._saved = 0
        self._is_reused = False
        self._computed_steps: dict[int, None] = {}
        self.skipped_steps = self.rule.skipped_steps
        samples = 2 if schedule.guided else 1
        self.cached_residuals = config.order + 1 + self.rule.cached_tensors / samples
        if config.mode != "online" and not self.skipped_steps:
            self.warnings = (f"--step-cache {config} saves nothing in {schedule.steps} steps.",)

    def block_cache(self, step: int, cfg_slice: CFGSlice) -> ForwardPass:
        return ForwardPass(self, step, cfg_slice)

    def find(self, call: ForwardPass, x: mx.array) -> mx.array | None:
        """Return the residual that replaces the blocks for tokens x, or None to run them."""
        if call.cfg_slice.start == 0:
            self._evaluations += 1
            is_whole = all(map(self._is_recent, range(call.cfg_slice.total)))
            same_mask = all(self._has_mask(i, call.mask) for i in range(len(x)))
            # Ask the rule in any case: it follows every evaluation.
            reuse = self.rule.should_reuse(call.step, x[:1]) and is_whole and same_mask
            self._is_reused = self._agree(reuse)
            self._saved += self._is_reused
        rows = range(call.cfg_slice.start, call.cfg_slice.start + len(x))
        if self._is_reused:
            found = [
                self._samples[row].extrapolate(call.t[i : i + 1]) for i, row in enumerate(rows)
            ]
            return found[0] if len(found) == 1 else mx.concatenate(found)
        self._computed_steps[call.step] = None
        for row in rows:  # drop what the next residual replaces, before the blocks need memory
            if row in self._samples:
                residuals = self._samples[row].residuals
                del residuals[: len(residuals) - self._order]
        return None

    def store(self, call: ForwardPass, x: mx.array, out: mx.array) -> None:
        """Cache the residual of the blocks that ran."""
        if call.cfg_slice.start == 0:
            self.rule.update(x[:1], out[:1])
        for i in range(len(x)):
            sample = self._samples.setdefault(call.cfg_slice.start + i, CachedSample())
            # Evaluated now: a lazy residual would keep all its inputs in memory.
            sample.residuals.append((_copy(out[i : i + 1] - x[i : i + 1]), call.t[i : i + 1]))
            sample.evaluation = self._evaluations
            sample.mask = None if call.mask is None else call.mask[i]

    def state(self) -> State:
        return {
            "kept": {str(row): sample.state() for row, sample in self._samples.items()},
            "evaluations": self._evaluations,
            "saved": self._saved,
            "computed": list(self._computed_steps),
            "rule": self.rule.state(),
        }

    def restore(self, state: State, /) -> None:
        self._samples = {int(row): CachedSample.from_state(s) for row, s in state["kept"].items()}
        self._evaluations, self._saved = state["evaluations"], state["saved"]
        self._computed_steps = dict.fromkeys(state["computed"])
        self.rule.restore(state["rule"])

    def record(self) -> dict[str, Any]:
        """Return computed: steps whose blocks ran; all evaluations, and those without blocks."""
        return {
            "computed": list(self._computed_steps),
            "evaluations": self._evaluations,
            "evaluations_saved": self._saved,
        }

    def summary(self) -> str:
        return (
            f"step_cache: the blocks ran in {self._evaluations - self._saved} of "
            f"{self._evaluations} evaluations; {self._saved} saved"
        )

    def _is_recent(self, row: int) -> bool:
        sample, first = self._samples.get(row), self._samples.get(0)
        return sample is not None and first is not None and sample.evaluation == first.evaluation

    def _has_mask(self, row: int, mask: mx.array | None) -> bool:
        sample = self._samples.get(row)
        if sample is None or sample.mask is None or mask is None:
            return sample is not None and sample.mask is None and mask is None
        return bool((sample.mask == mask[row]).all().item())


class ForwardPass:
    """One forward pass of the network with a residual cache. Fills BlockStackCache."""

    t: mx.array
    mask: mx.array | None

    def __init__(self, cache: ResidualCache, step: int, cfg_slice: CFGSlice) -> None:
        self._cache, self.step, self.cfg_slice = cache, step, cfg_slice

    def cached_residual(self, x: mx.array, t: mx.array, x_mask: mx.array | None) -> mx.array | None:
        self.t, self.mask = t, x_mask
        return self._cache.find(self, x)

    def update(self, x: mx.array, out: mx.array) -> None:
        self._cache.store(self, x, out)


def periodic_schedule(each: int, warmup: int, steps: int) -> frozenset[int]:
    """Return the first `warmup` steps, and from the last of them every `each`-th."""
    return frozenset(i for i in range(steps) if i < warmup or (i - warmup + 1) % each == 0)


def make_rule(config: StepCache, schedule: ScheduleInfo) -> CacheRule:
    """Return the rule of a config. Raises UsageError for a table that is missing or wrong."""
    if config.mode == "online":
        return OnlineRule(config.threshold, config.warmup, schedule.steps)
    if config.mode == "every":
        computed = periodic_schedule(config.each, config.warmup, schedule.steps)
    else:
        computed = read_schedule(config.computed, config.order, schedule, config.file)
    if schedule.first_step:
        computed |= {schedule.first_step}
    return ScheduledRule(computed, schedule.steps)


def _copy(x: mx.array) -> mx.array:
    """Return x evaluated, in memory of its own where it was a slice of another array."""
    x = mx.contiguous(x)
    mx.eval(x)
    return x


def _size(x: mx.array) -> float:
    return float(mx.abs(x).mean().item())  # type: ignore[arg-type]


def _distance(a: mx.array, b: mx.array) -> float:
    return _size(a - b)
