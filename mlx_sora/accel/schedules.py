"""Tables of step cache schedules, searched on a model's own weights by `calibrate`.

A file belongs to one model, number of steps and size. It lists the steps that run the blocks, for
every number of such steps.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.errors import UsageError, shell_words
from mlx_sora.loading.model_folder import model_argument
from mlx_sora.utils.files import atomic_write, explain_os_errors
from mlx_sora.utils.json import read_object

#: Folder of a model that holds its schedules.
FOLDER = "step_cache"


@dataclass(frozen=True)
class ScheduleTable:
    """Schedules of one model, number of steps, and size.

    orders: order of the extrapolation to number of computed steps to their indices. errors: the
    measured deviation of each from the exact path, as a share of its length. about: how it was
    measured.
    """

    steps: int
    width: int
    height: int
    num_frames: int
    orders: Mapping[str, Mapping[str, Sequence[int]]]
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path, *, overwrite: bool = False) -> Path:
        """Write the table as JSON, atomically; return where. Raises UsageError.

        Without `overwrite`, an existing file stays, and the table gets a free name beside it.
        """
        # Lists of numbers on one line each: they are read by people, too.
        text = re.sub(r"\n +(\d+,?)(?=\n)", r" \1", json.dumps(asdict(self), indent=1))
        text = re.sub(r"\[ (.*)\n +\]", r"[\1]", text)
        return write_table(text, path, overwrite=overwrite)


def write_table(text: str, path: Path, *, overwrite: bool) -> Path:
    """Write the text of a table, atomically, as `ScheduleTable.write` does; return where."""
    with explain_os_errors(path, UsageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, overwrite, error=UsageError) as file:
            file.partial.write_text(text + "\n", encoding="utf-8")
    return file.path


def table_path(model: Path, steps: int, size: tuple[int, int, int], folder: str = FOLDER) -> Path:
    """Return the path of a model's table for `steps` steps; size: width, height, frames."""
    width, height, frames = size
    return model / folder / f"{steps}-steps-{width}x{height}-{frames}.json"


def read_schedule(
    computed: int, order: int, schedule: ScheduleInfo, file: str = ""
) -> frozenset[int]:
    """Return the `computed` steps that run the blocks, from `file`, else from the model's folder.

    Raises UsageError if there is no such table or schedule.
    """
    assert schedule.model is not None, "the table lies in the model's folder"
    path = (
        Path(os.path.expanduser(file))
        if file
        else table_path(schedule.model, schedule.steps, schedule.size)
    )
    words = calibration_words(schedule, path, named=bool(file))
    command = f"python -m mlx_sora calibrate {shell_words(*words)}"
    fix = f"Use --step-cache every:3, or make the table: {command}"
    table = read_table(path, fix)
    found = (table.steps, table.width, table.height, table.num_frames)
    expected = (schedule.steps, *schedule.size)
    if found != expected:
        raise UsageError(f"{path} is for {show_key(found)}, this is {show_key(expected)}.", fix)
    schedules = table.orders.get(str(order), {})
    if str(computed) not in schedules:
        known = ", ".join(sorted(schedules, key=int)) or "none"
        raise UsageError(
            f"{path} has no schedule of {computed} computed steps with order {order}.",
            f"It has {known}. Use one of them.",
        )
    return frozenset(schedules[str(computed)])


def calibration_words(schedule: ScheduleInfo, file: Path, *, named: bool) -> list[Any]:
    """Return the options that make the table of a run. named: `file` is not the usual one."""
    assert schedule.model is not None
    steps, (width, height, frames) = schedule.steps, schedule.size
    words: list[Any] = ["--prompt", "TEXT", "--model", model_argument(schedule.model)]
    words += ["--steps", steps, "--width", width]
    words += ["--height", height, "--num-frames", frames]
    words += ["--output", file] if named else []
    words += ["--overwrite"] if os.path.exists(file) else []
    return words


def read_table(path: Path, fix: str = "") -> ScheduleTable:
    """Read a table. Raises UsageError, with `fix`, if the file is missing or not a table."""
    try:
        table = ScheduleTable(**read_object(path))
        numbers = (table.steps, table.width, table.height, table.num_frames)
        whole = all(type(number) is int for number in numbers)
        steps = range(table.steps)
        fits = whole and all(
            int(count) == len(schedule) == len(set(schedule))
            and all(type(step) is int and step in steps for step in schedule)
            for schedules in table.orders.values()
            for count, schedule in schedules.items()
        )
    except FileNotFoundError:
        raise UsageError(f"No table of schedules at {path}.", fix) from None
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UsageError(f"{path} is not a table of schedules.", fix)
    return table


def show_key(key: tuple[int, int, int, int]) -> str:
    """Return steps, width, height and frames for people."""
    steps, width, height, frames = key
    return f"{steps} steps at {width}x{height}, {frames} frames"
