"""Tables of the READMEs that follow from the package. As a module, writes them in place."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlx_sora.errors import MemoryBudgetError
from mlx_sora.geometry import Size, plan_geometry
from mlx_sora.memory.estimate import DEVICES, Device, Estimate, estimate, published_sizes
from mlx_sora.memory.plan import ModelSizes, Workload
from mlx_sora.request.generation import options
from mlx_sora.request.options import Option
from tests.invariants.keywords import FILE, keywords

README = Path(__file__).parents[2] / "README.md"

#: The README, then the guides in the folders of the package; `weights` there is a link.
DOCUMENTS = (
    README,
    *(
        path
        for path in sorted((README.parent / "mlx_sora").glob("*/README.md"))
        if not path.parent.is_symlink()
    ),
)
_BLOCK = re.compile(r"(<!-- (\w+): .*? -->\n).*?(<!-- /\2 -->)", re.DOTALL)

#: What is estimated: 240p at 16:9, a prompt of 60 tokens, 30 steps, weights in bfloat16.
_SIZE, _LENGTHS, _TOKENS, _STEPS, _ITEMSIZE = Size(426, 240), (51, 102), 60, 30, 2


def _flags(option: Option) -> str:
    """Flags of an option and its metavar."""
    if option.python_only:
        return "(Python only)"
    return " ".join([f"`{name}`" for name in option.typed_flags] + option.metavar.split())


def _help(option: Option) -> str:
    text = option.flag_help.replace("|", "\\|")
    if option.choices:
        text += ": " + ", ".join(f"`{choice}`" for choice in option.choices)
    return text


def all_options_tables() -> str:
    """Markdown: a heading and a table per group, with a row per option."""
    groups: dict[str, list[str]] = {}
    for name, option in options().items():
        keyword = f"**`{name}`**" if option.common else f"`{name}`"
        default = "" if option.default in (None, (), "") else f"`{option.default}`"
        others = ", ".join(task for task in option.tasks if task != "generate")
        groups.setdefault(option.group, []).append(
            f"| {_flags(option)} | {keyword} | {default} | {others} | {_help(option)} |\n"
        )
    head = "| flag | keyword | default | also in | what it does |\n|---|---|---|---|---|\n"
    return "".join(f"## {group}\n\n{head}{''.join(rows)}\n" for group, rows in groups.items())


def estimates_table(names: Collection[str] = ()) -> str:
    """Markdown table: a row per machine (all, or those named); times by length, and their peaks."""
    model = published_sizes(_ITEMSIZE)
    lengths = " | ".join(f"{frames} frames | peak" for frames in _LENGTHS)
    rows = [f"| machine | {lengths} |", f"|---{'|---|---' * len(_LENGTHS)}|"]
    for device in DEVICES:
        if not names or device.name in names:
            cells = [cell for frames in _LENGTHS for cell in _estimate(model, frames, device)]
            rows.append(f"| {device.name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


#: Machines of the README's own table.
_COMMON = (
    "Mac 8 GB, M1",
    "Mac 16 GB, M4",
    "Mac 24 GB, M4 Pro",
    "Mac 64 GB, M4 Max",
)


def _estimate(model: ModelSizes, frames: int, device: Device) -> tuple[str, str]:
    """Time and peak; an asterisk where guidance has to take two passes."""
    workload, mark = Workload(plan_geometry(_SIZE, frames), _TOKENS, _STEPS), ""
    try:
        found = estimate(model, workload, device, _ITEMSIZE)
    except MemoryBudgetError:
        workload, mark = replace(workload, sequential_guidance=True), " \\*"
        found = estimate(model, workload, device, _ITEMSIZE)
    return _duration(found) + mark, f"{found.plan.peak / 1e9:.1f} GB"


def _duration(found: Estimate) -> str:
    """No more digits than an estimate bears."""
    if found.total < 100:
        return f"{round(found.total / 10) * 10} s"
    return f"{found.total / 60:.0f} min"


TABLES = {
    "all_options": all_options_tables,
    "estimates": estimates_table,
    "macs": partial(estimates_table, _COMMON),
}


def with_tables(text: str) -> str:
    """Return the text of a README with the tables between their markers renewed."""
    return _BLOCK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


if __name__ == "__main__":
    FILE.write_text(keywords(), encoding="utf-8")
    subprocess.run(["ruff", "format", "--quiet", FILE], check=True)
    for path in DOCUMENTS:
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
