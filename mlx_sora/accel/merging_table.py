"""Tables of token merging, measured on a model's own weights by `calibrate --tdtm`.

A file belongs to one model, number of steps and size. It lists what merges (a site of some blocks
in some steps) in the order in which it pays: the first entries reach a speed at the least error.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.accel.schedules import calibration_words, show_key, table_path, write_table
from mlx_sora.errors import UsageError, shell_words
from mlx_sora.request.techniques import SITES
from mlx_sora.utils.json import read_object

#: Folder of a model that holds its tables.
FOLDER = "token_merging"


@dataclass(frozen=True)
class Part:
    """Merging at one site of some blocks in some steps, each [first, last].

    speed: that of all steps together to exact, by operations, if this part and all before it merge.
    error: estimated deviation of the latents then, as a share of the length of their path.
    """

    site: str
    blocks: Sequence[int]
    steps: Sequence[int]
    speed: float = 1
    error: float = 0

    def is_valid(self, blocks: int, steps: int) -> bool:
        """Return whether site, blocks and steps exist in a model and run."""
        ranges = ((self.blocks, blocks), (self.steps, steps))
        return (
            self.site in SITES
            and all(type(number) in (int, float) for number in (self.speed, self.error))
            and all(map(math.isfinite, (self.speed, self.error)))
            and all(len(own) == 2 and 0 <= own[0] <= own[1] < count for own, count in ranges)
            and all(type(number) is int for own, _ in ranges for number in own)
        )


@dataclass(frozen=True)
class MergingTable:
    """Order in which parts of a model merge, for one number of steps and size.

    blocks: of each kind in the model. about: how it was measured.
    """

    model: str
    blocks: int
    steps: int
    width: int
    height: int
    num_frames: int
    parts: Sequence[Part]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Steps, width, height and frames."""
        return self.steps, self.width, self.height, self.num_frames

    def write(self, path: Path, *, overwrite: bool = False) -> Path:
        """Write the table as JSON, a part per line; return where. Raises UsageError."""
        text = json.dumps(asdict(self), indent=1)
        text = re.sub(r"\{[^{}]*\}", lambda part: " ".join(part[0].split()), text)
        return write_table(text, path, overwrite=overwrite)

    def sites(self, speed: float) -> dict[int, tuple[tuple[str, ...], ...]]:
        """Return, by step, the sites of each block that merge for a speed; steps without are left.

        Of a site and its keys and values alone, the site remains.
        """
        found: dict[tuple[int, int], set[str]] = {}
        for part in self.parts:
            for step in range(part.steps[0], part.steps[1] + 1):
                for block in range(part.blocks[0], part.blocks[1] + 1):
                    found.setdefault((step, block), set()).add(part.site)
            if part.speed >= speed:
                break
        return {
            step: tuple(
                tuple(s for s in SITES if s in own and s.removesuffix("-kv") not in own - {s})
                for own in (found.get((step, block), set()) for block in range(self.blocks))
            )
            for step in sorted({step for step, _ in found})
        }


def read_merging(
    speed: float, schedule: ScheduleInfo, file: str = ""
) -> dict[int, tuple[tuple[str, ...], ...]]:
    """Return the sites by step and block for a speed, from `file`, else from the model's folder.

    Raises UsageError if there is no such table, or if it is another model's.
    """
    assert schedule.model is not None, "the table lies in the model's folder"
    own = table_path(schedule.model, schedule.steps, schedule.size, FOLDER)
    path = Path(os.path.expanduser(file)) if file else own
    words = ["--tdtm", f"{speed:g}", *calibration_words(schedule, path, named=bool(file))]
    command = f"python -m mlx_sora calibrate {shell_words(*words)}"
    fix = f"Use --tdtm last:15,sites=cross, or make the table: {command}"
    table = read_merging_table(path, fix)
    if (table.model, table.blocks) != (schedule.model_name, schedule.blocks):
        of = f"{table.model} with {table.blocks} blocks"
        this = f"{schedule.model_name} with {schedule.blocks}"
        raise UsageError(f"{path} is for the model {of}, this is {this}.", fix)
    if table.key != (schedule.steps, *schedule.size):
        this = show_key((schedule.steps, *schedule.size))
        raise UsageError(f"{path} is for {show_key(table.key)}, this is {this}.", fix)
    most = max((part.speed for part in table.parts), default=1)
    if most < speed:
        least = int(most * 1000) / 1000
        fix = f"Use --tdtm table:{least:g}, or make another: {command}"
        raise UsageError(f"{path} reaches {most:.3f}, not {speed:g} times the speed.", fix)
    return table.sites(speed)


def read_merging_table(path: Path, fix: str = "") -> MergingTable:
    """Read a table. Raises UsageError, with `fix`, if the file is missing or not a table."""
    try:
        content = read_object(path)
        parts = tuple(Part(**part) for part in content.pop("parts"))
        table = MergingTable(**content, parts=parts)
        numbers = (table.blocks, *table.key)
        fits = type(table.model) is str and all(type(number) is int for number in numbers)
        fits = fits and all(part.is_valid(table.blocks, table.steps) for part in parts)
    except FileNotFoundError:
        raise UsageError(f"No table of token merging at {path}.", fix) from None
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, TypeError, AttributeError, LookupError):
        fits = False
    if not fits:
        raise UsageError(f"{path} is not a table of token merging.", fix)
    return table
