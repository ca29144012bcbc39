"""Schedules of a step cache that were searched on a model's own weights: finding, reading, writing.

A file tells of one model, number of steps and size in which steps the blocks are to run, for every
number of such steps; `python -m mlx_sora calibrate` makes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.errors import UsageError
from mlx_sora.utils.files import atomic_write, explain_os_errors
from mlx_sora.utils.json import read_object

#: Folder of a model that holds its schedules.
FOLDER = "step_cache"


@dataclass(frozen=True)
class ScheduleTable:
    """Schedules of one model, number of steps, and size.

    orders: order of the forecast → number of computed steps → these steps, by index. errors: how
    far each was measured to lead away from the exact path, as a share of its length. about: what it
    was measured on.
    """

    steps: int
    width: int
    height: int
    num_frames: int
    orders: Mapping[str, Mapping[str, Sequence[int]]]
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the table as JSON, atomically. Raises UsageError."""
        # Lists of numbers on one line each: they are read by people, too.
        text = re.sub(r"\n +(\d+,?)(?=\n)", r" \1", json.dumps(asdict(self), indent=1))
        text = re.sub(r"\[ (.*)\n +\]", r"[\1]", text)
        with explain_os_errors(path, UsageError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, overwrite=True, error=UsageError) as file:
                file.partial.write_text(text + "\n", encoding="utf-8")


def table_path(model: Path, steps: int, size: tuple[int, int, int]) -> Path:
    """Where a model's table for `steps` steps and (width, height, frames) lies."""
    width, height, frames = size
    return model / FOLDER / f"{steps}-steps-{width}x{height}-{frames}.json"


def read_schedule(computed: int, order: int, job: ScheduleInfo, file: str = "") -> frozenset[int]:
    """The steps, `computed` of them, in which the blocks run; from `file`, else from the model.

    Raises UsageError where there is no such table or schedule.
    """
    assert job.model is not None, "a table is looked for beside a model"
    path = Path(file) if file else table_path(job.model, job.steps, job.size)
    table = read_table(path)
    own, asked = (table.steps, table.width, table.height, table.num_frames), (job.steps, *job.size)
    if own != asked:
        raise UsageError(
            f"{path} is for {_show(own)}, this is {_show(asked)}.", "Make one with calibrate."
        )
    schedules = table.orders.get(str(order), {})
    if str(computed) not in schedules:
        known = ", ".join(sorted(schedules, key=int)) or "none"
        raise UsageError(
            f"{path} has no schedule of {computed} computed steps with order {order}.",
            f"It has {known}.",
        )
    return frozenset(schedules[str(computed)])


def read_table(path: Path) -> ScheduleTable:
    """A table from its file. Raises UsageError where there is none, or something else."""
    try:
        table = ScheduleTable(**read_object(path))
        numbers = (table.steps, table.width, table.height, table.num_frames)
        whole = all(type(number) is int for number in numbers)
        steps = range(table.steps)
        fits = whole and all(
            int(count) == len(set(schedule))
            and all(type(step) is int and step in steps for step in schedule)
            for schedules in table.orders.values()
            for count, schedule in schedules.items()
        )
    except FileNotFoundError:
        raise UsageError(
            f"There is no table of schedules {path}.",
            "Make it with: python -m mlx_sora calibrate, or use --step-cache every:3.",
        ) from None
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UsageError(f"{path} is not a table of schedules.", "Make it anew with calibrate.")
    return table


def _show(key: tuple[int, int, int, int]) -> str:
    steps, width, height, frames = key
    return f"{steps} steps at {width}x{height}, {frames} frames"
