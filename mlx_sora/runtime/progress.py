"""Progress of a run from its events: stage, share of the work, pace, seconds left. No drawing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from mlx_sora.runtime.events import (
    Event,
    PlannedStage,
    RequestFailed,
    RequestStarted,
    RunPlanned,
    StageFinished,
    StageProgress,
    StageStarted,
    StepFinished,
)

#: Units whose mean is the pace: a multiple of the usual periods of step caches.
_RECENT = 12

#: Names of the units of each stage.
UNITS = {"hash": "MB", "encode": "prompt", "read": "chunk", "denoise": "step", "decode": "frame"}


class RunProgress:
    """Progress of one run, or of several requests. Feed it every event.

    stage: the stage now, or the last one; `done` of its `total` units are finished.
    seconds_per_unit: the pace of its last units, which this process made; None before the first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ahead: list[PlannedStage] = []
        self._now = PlannedStage("", 0, 0.0)
        self._work = 0.0
        self._pace: dict[str, float] = {}
        self._marks: deque[tuple[int, float]] = deque(maxlen=_RECENT + 1)
        self.done = 0
        self.seconds_per_unit: float | None = None

    def handle(self, event: Event) -> None:
        """Take an event into account."""
        if isinstance(event, RunPlanned):
            self._ahead = list(event.stages)
            self._work = sum(stage.work for stage in event.stages)
        elif isinstance(event, StageStarted):
            self._start(event)
        elif isinstance(event, StepFinished):
            self._advance(event.step + 1)
        elif isinstance(event, StageProgress):
            self._advance(event.done)
        elif isinstance(event, StageFinished):
            self._finish()
        elif isinstance(event, RequestStarted):
            self._skip(event.index)
        elif isinstance(event, RequestFailed):
            self._skip(event.index + 1)

    @property
    def stage(self) -> str:
        """Name of the stage; empty before the first."""
        return self._now.stage

    @property
    def total(self) -> int:
        """Units of the stage."""
        return self._now.total

    @property
    def clip(self) -> int:
        """Index of the clip that the stage works on."""
        return self._now.clip

    @property
    def clips(self) -> int:
        """Number of clips of the video."""
        return self._now.clips

    @property
    def place(self) -> str:
        """Clip and pass, where there are several: " clip 2 of 3 pass 1 of 2"."""
        now = self._now
        clip = f" clip {now.clip + 1} of {now.clips}" if now.clips > 1 else ""
        return clip + (f" pass {now.pass_index + 1} of {now.passes}" if now.passes > 1 else "")

    @property
    def fraction(self) -> float:
        """Share of the run's work that is finished, from 0 to 1; of the stage's without a plan."""
        if not self._work:
            return self.done / self.total if self.total else 0.0
        left = self._left(self._now, self.done) + sum(self._left(s, s.done) for s in self._ahead)
        return min(1.0, max(0.0, 1 - left / self._work))

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end of the run, from the pace of what this process has made.

        None before the first unit whose pace says something about the others.
        """
        if self.done < self.total:
            if self.seconds_per_unit is None:
                return None
            left = (self.total - self.done) * self.seconds_per_unit
        else:
            left = 0.0
        for stage in self._ahead:
            work = self._left(stage, stage.done)
            pace = self._pace.get(stage.stage, self._other_pace())
            if work and pace is None:
                return None
            left += work * (pace or 0.0)
        return left

    def _other_pace(self) -> float | None:
        """Return the seconds per operation of the last stage, for stages that are to come.

        The text encoder mostly waits for the disk, so that its pace says nothing about others.
        """
        known = [pace for stage, pace in self._pace.items() if stage not in ("encode", "hash")]
        return known[-1] if known else None

    def _start(self, event: StageStarted) -> None:
        names = [stage.stage for stage in self._ahead]
        self._now = PlannedStage(event.stage, event.total, 0.0)
        if event.stage in names:
            index = names.index(event.stage)
            self._now = self._ahead[index]
            del self._ahead[: index + 1]
        self.done, self.seconds_per_unit = self._now.done, None
        self._marks.clear()
        self._marks.append((self.done, self._clock()))

    def _advance(self, done: int) -> None:
        self.done = done
        self._marks.append((done, self._clock()))
        if len(self._marks) > 2 and self._marks[0][0] == self._now.done:
            self._marks.popleft()  # the first unit also loads the weights
        (first, start), (last, end) = self._marks[0], self._marks[-1]
        if last > first:
            self.seconds_per_unit = (end - start) / (last - first)
        if self.seconds_per_unit is not None and self._now.work:
            self._pace.pop(self.stage, None)  # the newest comes last
            self._pace[self.stage] = self.seconds_per_unit * self.total / self._now.work

    def _finish(self) -> None:
        if self.stage in self._pace and self.done < self.total:  # a leap, as later clips will make
            self._pace[self.stage] *= self.done / self.total
        self.done = self._now.total

    def _skip(self, request: int) -> None:
        """Leave out what is planned for requests before `request`, but text for all."""
        self._ahead = [stage for stage in self._ahead if stage.request >= request]
        if self._now.request < request:
            self.done = self._now.total

    @staticmethod
    def _left(stage: PlannedStage, done: int) -> float:
        return stage.work * (1 - done / stage.total) if stage.total else 0.0


def format_duration(seconds: float) -> str:
    """Format seconds with no more digits than an estimate bears."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def progress_title(progress: RunProgress) -> str:
    """Return the stage, and the clip if there are several: "denoise clip 2 of 3"."""
    return f"{progress.stage:<7}{progress.place}"


def progress_speed(progress: RunProgress) -> str:
    """Return one rate and the time left of the run: "0.85 s/step, 25 s left"."""
    seconds, unit = progress.seconds_per_unit, UNITS.get(progress.stage, "unit")
    parts = []
    if seconds:
        parts.append(f"{seconds:.3g} s/{unit}" if seconds > 0.5 else f"{1 / seconds:.3g} {unit}/s")
    if left := progress.seconds_left:
        parts.append(f"{format_duration(left)} left")
    return ", ".join(parts)
