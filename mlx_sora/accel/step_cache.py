"""Step cache: in some steps the blocks do not run; what they added last time is added again.

What all blocks together add to the tokens changes little from step to step, so one tensor stands
for all of them (as in MagCache, GCache and EasyCache). Which steps run the blocks is a fixed
schedule, a table searched on the model itself (`accel/schedules.py`), or decided in the run.
Instead of the last sum, its line through the last two over flow time can be used (order 1, as in
TaylorSeer). Dimension letters: B batch, T frames, S tokens per frame, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from mlx_sora.accel.base import Acceleration, ScheduleInfo
from mlx_sora.accel.schedules import read_schedule
from mlx_sora.models.hooks import BlockStackCache
from mlx_sora.request.modes import ParsedMode
from mlx_sora.sampling.base import State
from mlx_sora.sampling.guidance import CFGSlice
from mlx_sora.sampling.loop import StepResult


class CacheRule(Protocol):
    """Says in which evaluations the last sum will do. Sees the first sample, [1, T, S, C]."""

    #: Steps in which the blocks are known not to run.
    skipped_steps: frozenset[int]

    #: Tensors [1, T, S, C] that it keeps besides the sums.
    cached_tensors: int

    def reuses(self, step: int, x: mx.array) -> bool:
        """Whether tokens x need no blocks; asked once per evaluation."""

    def update(self, x: mx.array, out: mx.array) -> None:
        """The blocks have made `out` of x."""

    def state(self) -> State:
        """Return the state after a step, in new containers."""

    def restore(self, state: State, /) -> None:
        """Set the state that an interrupted run had."""


class Scheduled:
    """The blocks run in the steps of a schedule only."""

    cached_tensors = 0

    def __init__(self, computed: frozenset[int], steps: int) -> None:
        self.skipped_steps = frozenset(range(steps)) - computed

    def reuses(self, step: int, x: mx.array) -> bool:
        return step in self.skipped_steps

    def update(self, x: mx.array, out: mx.array) -> None:
        """Do nothing: the schedule is fixed."""

    def state(self) -> State:
        return {}

    def restore(self, state: State, /) -> None:
        """Do nothing: the schedule is fixed."""


def every(each: int, warmup: int, steps: int) -> frozenset[int]:
    """The first `warmup` steps, and from the last of them every `each`-th."""
    return frozenset(i for i in range(steps) if i < warmup or (i - warmup + 1) % each == 0)


class Online:
    """Decides from how far the tokens have moved; the rule of NaviCache, close to EasyCache's.

    The change of the outcome is foreseen as that of the tokens times the ratio of both, which is
    followed over the evaluations that are computed. Once what is foreseen adds up to `threshold`
    of the outcome, the blocks run; in the first `warmup` steps and the last one they always do.
    """

    skipped_steps: frozenset[int] = frozenset()
    cached_tensors = 3

    #: Share of a newly measured ratio in the one that is used: NaviCache's filter, once settled.
    GAIN = 0.618

    def __init__(self, threshold: float, warmup: int, steps: int) -> None:
        self._threshold, self._warmup, self._last = threshold, warmup, steps - 1
        self._before: mx.array | None = None
        self._computed: tuple[mx.array, mx.array] | None = None
        self._ratio: float | None = None
        self._level = 1.0
        self._error = 0.0
        self._step = 0

    def reuses(self, step: int, x: mx.array) -> bool:
        before, self._before, self._step = self._before, _own(x), step
        if before is None or self._ratio is None:
            return False
        self._error += self._ratio * _distance(x, before) / self._level
        return self._warmup <= step < self._last and self._error < self._threshold

    def update(self, x: mx.array, out: mx.array) -> None:
        self._error = 0.0
        last, self._computed = self._computed, (_own(x), _own(out))
        self._level = max(_size(out), 1e-12)
        if last is None:
            return
        moved = _distance(x, last[0])
        if moved <= 0:
            return
        ratio = _distance(out, last[1]) / moved
        settled = self._ratio is not None and self._step >= self._warmup
        gain = self.GAIN if settled else 1.0
        self._ratio = ratio if self._ratio is None else self._ratio + gain * (ratio - self._ratio)

    def state(self) -> State:
        return {
            "before": self._before,
            "computed": None if self._computed is None else list(self._computed),
            "ratio": self._ratio,
            "level": self._level,
            "error": self._error,
        }

    def restore(self, state: State, /) -> None:
        self._before, self._ratio = state["before"], state["ratio"]
        self._level, self._error = state["level"], state["error"]
        self._computed = None if state["computed"] is None else tuple(state["computed"])


def _own(x: mx.array) -> mx.array:
    """x evaluated, in memory of its own, where it was a part of another array."""
    x = mx.contiguous(x)
    mx.eval(x)
    return x


def _size(x: mx.array) -> float:
    return float(mx.abs(x).mean().item())  # type: ignore[arg-type]


def _distance(a: mx.array, b: mx.array) -> float:
    return _size(a - b)


@dataclass
class CachedSample:
    """Sums of one sample, [1, T, S, C], with flow time t [1]; the newest last.

    evaluation: number of that in which the newest was made; mask [1, T]: which frames moved in it.
    """

    sums: list[tuple[mx.array, mx.array]] = field(default_factory=list)
    evaluation: int = -1
    mask: mx.array | None = None

    def at(self, t: mx.array) -> mx.array:
        """The newest sum, or, from two of them, the line through both at flow time t [1]."""
        newest, own = self.sums[-1]
        if len(self.sums) == 1:
            return newest
        older, other = self.sums[-2]
        apart = own - other
        # Evaluations at one time (a step of no length) say nothing about the slope.
        share = mx.where(apart == 0, 0, (t - own) / mx.where(apart == 0, 1, apart))
        return newest + (newest - older) * share.reshape(-1, 1, 1, 1)

    def state(self) -> State:
        return {
            "sums": [{"sum": total, "t": t} for total, t in self.sums],
            "evaluation": self.evaluation,
            "mask": self.mask,
        }

    @classmethod
    def of(cls, state: State) -> CachedSample:
        sums = [(item["sum"], item["t"]) for item in state["sums"]]
        return cls(sums, state["evaluation"], state["mask"])


class StepCache(Acceleration):
    """A rule at work in a run. order: 0 for the last sum, 1 for the line through the last two.

    A sample whose mask has changed since, or whose sum is older than that of the others, has the
    blocks run whatever the rule says; a batch does as its first sample.
    """

    def __init__(self, rule: CacheRule, order: int, job: ScheduleInfo) -> None:
        self._rule, self._order, self._job = rule, order, job
        self._kept: dict[int, CachedSample] = {}
        self._evaluations = self._saved = 0
        self._reuses = False
        self._computed: dict[int, None] = {}
        self.skipped_steps = rule.skipped_steps
        samples = 2 if job.guided else 1
        self.cached_residuals = order + 1 + rule.cached_tensors / samples

    def block_cache(self, step: int, part: CFGSlice) -> BlockStackCache:
        return _Call(self, step, part)

    def lookup(self, call: _Call, x: mx.array) -> mx.array | None:
        """What stands for the blocks in `call`, or None."""
        if call.part.start == 0:
            self._evaluations += 1
            whole = all(map(self._is_fresh, range(call.part.total)))
            same = all(self._same_mask(i, call.mask) for i in range(len(x)))
            # Asked in any case: a rule follows every evaluation.
            reuses = self._rule.reuses(call.step, x[:1]) and whole and same
            self._reuses = self._job.agree(reuses)
            self._saved += self._reuses
        if self._reuses:
            rows = range(call.part.start, call.part.start + len(x))
            found = [self._kept[row].at(call.t[i : i + 1]) for i, row in enumerate(rows)]
            return found[0] if len(found) == 1 else mx.concatenate(found)
        self._computed[call.step] = None
        self._forget(call.part, len(x))
        return None

    def store(self, call: _Call, x: mx.array, out: mx.array) -> None:
        """Take what the blocks added to x in `call`."""
        if call.part.start == 0:
            self._rule.update(x[:1], out[:1])
        for i in range(len(x)):
            kept = self._kept.setdefault(call.part.start + i, CachedSample())
            # Evaluated now: left lazy, it would hold the tensors that it is made of.
            kept.sums.append((_own(out[i : i + 1] - x[i : i + 1]), call.t[i : i + 1]))
            kept.evaluation = self._evaluations
            kept.mask = None if call.mask is None else call.mask[i]

    def on_step_end(self, result: StepResult) -> None:
        """Everything is known from the calls."""

    def state(self) -> State:
        return {
            "kept": {str(row): kept.state() for row, kept in self._kept.items()},
            "evaluations": self._evaluations,
            "saved": self._saved,
            "computed": list(self._computed),
            "rule": self._rule.state(),
        }

    def restore(self, state: State, /) -> None:
        self._kept = {int(row): CachedSample.of(kept) for row, kept in state["kept"].items()}
        self._evaluations, self._saved = state["evaluations"], state["saved"]
        self._computed = dict.fromkeys(state["computed"])
        self._rule.restore(state["rule"])

    def record(self) -> dict[str, Any]:
        """computed: steps in which blocks ran; evaluations made, and of them without blocks."""
        return {
            "computed": list(self._computed),
            "evaluations": self._evaluations,
            "evaluations_saved": self._saved,
        }

    def summary(self) -> str:
        return (
            f"step_cache: the blocks ran in {self._evaluations - self._saved} of "
            f"{self._evaluations} evaluations; {self._saved} saved"
        )

    def _is_fresh(self, row: int) -> bool:
        kept, first = self._kept.get(row), self._kept.get(0)
        return kept is not None and first is not None and kept.evaluation == first.evaluation

    def _same_mask(self, row: int, mask: mx.array | None) -> bool:
        kept = self._kept.get(row)
        if kept is None or kept.mask is None or mask is None:
            return kept is not None and kept.mask is None and mask is None
        return bool((kept.mask == mask[row]).all().item())

    def _forget(self, part: CFGSlice, count: int) -> None:
        """Of samples about to be computed, the sums that will not be needed again."""
        for row in range(part.start, part.start + count):
            if row in self._kept:
                sums = self._kept[row].sums
                del sums[: len(sums) - self._order]


class _Call:
    """One call of the network; fills the seam StackPolicy."""

    def __init__(self, cache: StepCache, step: int, part: CFGSlice) -> None:
        self._cache, self.step, self.part = cache, step, part
        self.t, self.mask = mx.zeros(0), None

    t: mx.array
    mask: mx.array | None

    def cached_residual(self, x: mx.array, t: mx.array, x_mask: mx.array | None) -> mx.array | None:
        self.t, self.mask = t, x_mask
        return self._cache.lookup(self, x)

    def update(self, x: mx.array, out: mx.array) -> None:
        self._cache.store(self, x, out)


def start(mode: ParsedMode, job: ScheduleInfo) -> StepCache:
    """What the option --step-cache asks for, unless it is off."""
    values, order = mode.values, int(mode.values["order"])
    if mode.name == "online":
        rule: CacheRule = Online(values["threshold"], int(values["warmup"]), job.steps)
        return StepCache(rule, order, job)
    if mode.name == "every":
        computed = every(int(values["each"]), int(values["warmup"]), job.steps)
    else:
        computed = read_schedule(int(values["computed"]), order, job, mode.texts["file"])
    cache = StepCache(Scheduled(computed, job.steps), order, job)
    if not cache.skipped_steps:
        cache.warnings = (f"--step-cache {mode.text} saves nothing in {job.steps} steps.",)
    return cache
