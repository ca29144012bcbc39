"""Progress on the terminal: events of a run as bars, JSON lines or nothing, and bars of files."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mlx_sora.errors import printable
from mlx_sora.runtime.events import (
    Event,
    Finished,
    Noted,
    PreviewReady,
    RequestFailed,
    RequestStarted,
    RunPlanned,
    StageFinished,
    StageProgress,
    StageStarted,
    StepFinished,
    Warned,
)
from mlx_sora.runtime.progress import RunProgress, progress_speed, progress_title

if TYPE_CHECKING:
    from mlx_sora.manage.progress import FileProgress
    from mlx_sora.memory.plan import Plan

#: Actions on files whose progress is in prompts or steps, not in bytes.
COUNTED = ("calibrate", "distill")

#: Seconds between redraws of a bar.
_REDRAW = 0.1

#: Least seconds between lines in a log, and least share of the time so far.
_LOG_SECONDS, _LOG_SHARE = 10.0, 0.05

#: Most characters of a prompt in a line of progress.
MAX_PROMPT = 200


class Renderer(Protocol):
    """Output of the events of a run."""

    def note(self, text: str) -> None:
        """Show a line that is not part of the result."""

    def handle(self, event: Event) -> None:
        """Show one event."""

    def close(self) -> None:
        """Close the open bar, also after an error."""


class BarRenderer:
    """Renderer with a bar for each stage and a table on stderr, and the path on stdout."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._progress = RunProgress()
        self._stages: list[StageFinished] = []

    def note(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write("\n".join(map(printable, text.split("\n"))), file=sys.stderr)

    def handle(self, event: Event) -> None:
        self._progress.handle(event)
        if isinstance(event, StageStarted):
            self._open()
        elif isinstance(event, (StepFinished, StageProgress)):
            self._advance()
        elif isinstance(event, StageFinished):
            self._advance()
            self.close()
            self._stages.append(event)
        elif isinstance(event, Warned):
            self.note(f"warning: {event.message}")
        elif isinstance(event, Noted):
            self.note(event.message)
        elif isinstance(event, RequestStarted):
            place = f"{event.index + 1} of {event.total}"
            self.note(f"{place}, seed {event.seed}: {printable(event.prompt, MAX_PROMPT)}")
        elif isinstance(event, RequestFailed):
            self.close()
        elif isinstance(event, Finished):
            self.close()
            if self._stages:  # empty if another rank made the video
                self.note("\n".join(stage_table(self._stages)))
            self._stages = []
            print_result(event)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open(self) -> None:
        self.close()
        progress = self._progress
        self._bar = open_bar(
            total=progress.total, initial=progress.done, desc=progress_title(progress)
        )

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(progress_speed(self._progress), refresh=False)
            self._bar.update(self._progress.done - self._bar.n)


class JsonRenderer:
    """Renderer that prints each event on stdout as a line of JSON, without arrays."""

    def note(self, text: str) -> None:
        self._print({"event": "note", "message": text})

    def handle(self, event: Event) -> None:
        self._print(event_record(event))

    def close(self) -> None:
        """Do nothing."""

    def _print(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), flush=True)


class QuietRenderer:
    """Renderer that prints only the path, on stdout."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def handle(self, event: Event) -> None:
        if isinstance(event, Finished):
            print_result(event)

    def close(self) -> None:
        """Do nothing."""


class SilentRenderer(QuietRenderer):
    """Renderer that prints nothing."""

    def handle(self, event: Event) -> None:
        """Do nothing."""


def event_record(event: Event) -> dict[str, Any]:
    """Return an event as JSON values. "event" is its type in snake case."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    record: dict[str, Any] = {"event": name}
    if isinstance(event, Finished):
        video = event.video
        plain = ("width", "height", "num_frames", "fps", "seed")
        record |= {key: getattr(video, key) for key in plain}
        record["path"] = None if video.path is None else str(video.path)
        record["warnings"] = list(video.warnings)
        record["seconds"], record["peak_memory"] = dict(video.timings), dict(video.memory)
        return record
    if isinstance(event, RequestFailed):
        error = event.error
        record |= {"index": event.index, "message": error.flag_text, "exit_code": error.exit_code}
        return record
    if isinstance(event, RunPlanned):
        return record | dataclasses.asdict(event)
    if isinstance(event, PreviewReady):
        record["shape"] = list(event.frames.shape)
    names = [item.name for item in dataclasses.fields(event)]
    return record | {n: getattr(event, n) for n in names if n not in ("latents", "frames")}


def stage_table(stages: Sequence[StageFinished]) -> Iterator[str]:
    """Yield the lines of a table: seconds and peak memory of each stage and of the run."""
    yield f"{'stage':<9}{'seconds':>9}{'peak MLX':>12}{'peak process':>14}"
    names = dict.fromkeys(stage.stage for stage in stages)
    groups = {name: [stage for stage in stages if stage.stage == name] for name in names}
    for name, group in (groups | {"total": stages}).items():
        seconds = sum(stage.seconds for stage in group)
        peak, rss = max(s.peak_memory for s in group), max(s.peak_rss for s in group)
        yield f"{name:<9}{seconds:>9.2f}{human_bytes(peak):>12}{human_bytes(rss):>14}"


def plan_table(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan: requirements of each stage, and the smallest possible budget.

    Stages of a second pass have a 2 behind their names.
    """
    yield f"{'stage':<9}{'peak':>11}{'read':>11}{'TFLOP':>9}{'resident blocks':>17}  frames at once"
    seen = Counter[str]()
    for stage in plan.stages:
        seen[stage.stage] += 1
        name = stage.stage if seen[stage.stage] == 1 else f"{stage.stage} {seen[stage.stage]}"
        blocks = f"{stage.resident} of {stage.blocks}" if stage.blocks else "-"
        frames = "-" if stage.micro_batch is None else str(stage.micro_batch)
        yield (
            f"{name:<9}{human_bytes(stage.peak):>11}{human_bytes(stage.read):>11}"
            f"{stage.flops / 1e12:>9.3g}{blocks:>17}  {frames}"
        )
    budget = "none" if plan.budget is None else human_bytes(plan.budget)
    yield (
        f"peak of the process {human_bytes(plan.peak)}; memory budget {budget}, "
        f"smallest possible {human_bytes(plan.smallest)}"
    )


def print_result(event: Finished) -> None:
    """Print the path on stdout on a line of its own, for scripts."""
    if event.video.path is not None:
        print(event.video.path, flush=True)


def human_bytes(number: float) -> str:
    """Return bytes with a readable unit. 1 GB is 10^9 bytes."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


class Bars:
    """Bars of files on stderr, one at a time. interrupt_note: printed if Ctrl-C ends the block."""

    def __init__(self, quiet: bool, interrupt_note: str = "") -> None:
        self._quiet, self._interrupt_note = quiet, interrupt_note
        self._bar: Any = None
        self._file: tuple[str, str] | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is KeyboardInterrupt and self._interrupt_note:
            self.note(self._interrupt_note)

    def note(self, text: str) -> None:
        """Print a line beside the bars."""
        if not self._quiet:
            print(text, file=sys.stderr)

    def show(self, progress: FileProgress) -> None:
        """Draw the progress of a file."""
        if self._quiet:
            return
        if self._file != (progress.action, progress.path):
            self.close()
            self._file = (progress.action, progress.path)
            self._bar = open_bar(
                total=progress.total,
                # Bytes of an earlier download count as done, not as speed.
                initial=progress.done if progress.action == "fetch" else 0,
                desc=f"{progress.action} {progress.path}",
                unit="" if progress.action in COUNTED else "B",
                unit_scale=progress.action not in COUNTED,
            )
        self._bar.update(progress.done - self._bar.n)

    def close(self) -> None:
        """Close the open bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._file = None


class PlainBar:
    """Bar for logs: a plain line now and then, and one at the end. Takes what tqdm does."""

    def __init__(
        self, *, total: int, desc: str, initial: int = 0, unit: str = "", **_: object
    ) -> None:
        self.n, self._total, self._desc, self._unit = initial, total, desc, unit
        self._text, self._start = "", time.monotonic()
        self._next = self._start + _LOG_SECONDS

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        """Set the end of the line."""
        self._text = text

    def update(self, count: int) -> None:
        """Add to what is done."""
        self.n += count
        if (now := time.monotonic()) >= self._next:
            self._next = now + max(_LOG_SECONDS, _LOG_SHARE * (now - self._start))
            self._print()

    def close(self) -> None:
        """Print the last line."""
        self._print()

    def _print(self) -> None:
        size = human_bytes if self._unit == "B" else str
        share = f"{self.n / self._total:.0%}" if self._total else "100%"
        line = f"{self._desc} {share:>4} {size(self.n)}/{size(self._total)}"
        print(f"{line}, {self._text}" if self._text else line, file=sys.stderr, flush=True)


def open_bar(**options: Any) -> Any:
    """Return a bar of tqdm on a terminal, else a PlainBar."""
    if not sys.stderr.isatty():
        return PlainBar(**options)
    from tqdm import tqdm

    if "unit" not in options:  # the events' own rate in place of tqdm's
        options["bar_format"] = (
            "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        )
    return tqdm(
        file=sys.stderr, mininterval=_REDRAW, maxinterval=_REDRAW, dynamic_ncols=True, **options
    )
