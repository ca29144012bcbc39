"""Renderers of the events of a run: progress bars, JSON lines, or nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_sora.errors import printable
from mlx_sora.runtime.events import (
    Event,
    Finished,
    Noted,
    PreviewReady,
    RequestFailed,
    RequestStarted,
    StageFinished,
    StageProgress,
    StageStarted,
    StepFinished,
    Warned,
)

if TYPE_CHECKING:
    from mlx_sora.manage.progress import FileProgress
    from mlx_sora.memory.plan import Plan

#: Seconds between redraws, on a terminal and in a log file.
_REDRAW_TERMINAL, _REDRAW_LOG = 0.1, 10.0

#: Limit of the characters of a prompt in a line of progress.
MAX_PROMPT = 200

UNITS = {"encode": "prompt", "read": "chunk", "denoise": "step", "decode": "frame"}


class Renderer(Protocol):
    """Shows events to the user."""

    def note(self, text: str) -> None:
        """Show a line that is not part of the result."""

    def handle(self, event: Event) -> None:
        """Show one event."""

    def close(self) -> None:
        """Close the open bar, also after an error."""


class BarRenderer:
    """Shows tqdm bars and a table on stderr. The path comes last, on stdout."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stages: list[StageFinished] = []

    def note(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write("\n".join(map(printable, text.split("\n"))), file=sys.stderr)

    def handle(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self._open(event)
        elif isinstance(event, StepFinished):
            self._advance(event.step + 1, f"{event.seconds:.2f} s/step")
        elif isinstance(event, StageProgress):
            self._advance(event.done)
        elif isinstance(event, StageFinished):
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
                self.note("\n".join(summary(self._stages)))
            self._stages = []
            print_result(event)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open(self, event: StageStarted) -> None:
        from tqdm import tqdm

        self.close()
        redraw = _REDRAW_TERMINAL if sys.stderr.isatty() else _REDRAW_LOG
        self._bar = tqdm(
            total=event.total,
            desc=f"{event.stage:<7}",
            unit=" " + UNITS.get(event.stage, "unit"),
            file=sys.stderr,
            mininterval=redraw,
            maxinterval=redraw,
            dynamic_ncols=True,
        )

    def _advance(self, done: int, text: str = "") -> None:
        if self._bar is None:
            return
        if text:
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)


class JsonRenderer:
    """Prints a JSON object in each line on stdout, without arrays."""

    def note(self, text: str) -> None:
        self._print({"event": "note", "message": text})

    def handle(self, event: Event) -> None:
        self._print(event_record(event))

    def close(self) -> None:
        """Do nothing."""

    def _print(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), flush=True)


class QuietRenderer:
    """Prints only the path, on stdout."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def handle(self, event: Event) -> None:
        if isinstance(event, Finished):
            print_result(event)

    def close(self) -> None:
        """Do nothing."""


class SilentRenderer(QuietRenderer):
    """Prints nothing."""

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
        failure = {"message": str(event.error), "exit_code": event.error.exit_code}
        return record | {"index": event.index} | failure
    left_out = {"latents", "frames"}
    if isinstance(event, PreviewReady):
        record["shape"] = list(event.frames.shape)
    for item in dataclasses.fields(event):
        if item.name not in left_out:
            record[item.name] = getattr(event, item.name)
    return record


def summary(stages: list[StageFinished]) -> Iterator[str]:
    """Yield the lines of the last table: seconds and peaks of each stage and of the run."""
    yield f"{'stage':<9}{'seconds':>9}{'peak MLX':>12}{'peak process':>14}"
    groups = {name: [s for s in stages if s.stage == name] for name in [s.stage for s in stages]}
    for name, group in (groups | {"total": stages} if stages else groups).items():
        yield _row(
            name,
            sum(item.seconds for item in group),
            max(item.peak_memory for item in group),
            max(item.peak_rss for item in group),
        )


def plan_table(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan: requirements of each stage, and the smallest possible budget."""
    yield f"{'stage':<9}{'peak':>11}{'read':>11}{'TFLOP':>9}{'resident blocks':>17}  frames at once"
    for stage in plan.stages:
        blocks = f"{stage.resident} of {stage.blocks}" if stage.blocks else "-"
        frames = "-" if stage.micro_batch is None else str(stage.micro_batch)
        yield (
            f"{stage.stage:<9}{human_bytes(stage.peak):>11}{human_bytes(stage.read):>11}"
            f"{stage.flops / 1e12:>9.3g}{blocks:>17}  {frames}"
        )
    budget = "no budget" if plan.budget is None else f"budget {human_bytes(plan.budget)}"
    yield (
        f"{budget}; the process peaks at {human_bytes(plan.peak)}; "
        f"the smallest possible budget is {human_bytes(plan.smallest)}"
    )


def print_result(event: Finished) -> None:
    """Print the path on stdout on a line of its own, for scripts."""
    path: Path | None = event.video.path
    if path is not None:
        print(path, flush=True)


def human_bytes(number: float) -> str:
    """Return bytes with a readable unit. 1 GB is 10^9 bytes."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def _row(name: str, seconds: float, peak: int, rss: int) -> str:
    return f"{name:<9}{seconds:>9.2f}{human_bytes(peak):>12}{human_bytes(rss):>14}"


class Bars:
    """One bar for each file, on stderr. interrupt_note: shown when Ctrl-C ends the block."""

    def __init__(self, quiet: bool, interrupt_note: str = "") -> None:
        self._quiet, self._interrupt_note = quiet, interrupt_note
        self._bar: Any = None
        self._shown: tuple[str, str] | None = None

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
        if self._shown != (progress.action, progress.path):
            self.close()
            self._shown = (progress.action, progress.path)
            self._bar = self._open(progress)
        self._bar.update(progress.done - self._bar.n)

    def close(self) -> None:
        """Close the open bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._shown = None

    def _open(self, progress: FileProgress) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=progress.total,
            # Bytes of an earlier download count as done, not as speed.
            initial=progress.done if progress.action == "fetch" else 0,
            desc=f"{progress.action} {progress.path}",
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )
