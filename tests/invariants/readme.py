"""The options table of the README, from `GenerationRequest`. As a module, writes it in place."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from mlx_sora.options import Option
from mlx_sora.request import GenerationRequest, options

README = Path(__file__).parents[2] / "README.md"
_BLOCK = re.compile(r"(<!-- options: .*? -->\n).*?(<!-- /options -->)", re.DOTALL)


def _flags(option: Option, default: object) -> str:
    """Flags with their value's name; a switch that is on by default is shown by its off form."""
    if not option.flags:
        return "(Python only)"
    names = option.flags
    if default is True:
        names = tuple("--no-" + name.removeprefix("--") for name in names)
    value = "" if isinstance(default, bool) else f" {option.metavar}".rstrip()
    return " ".join(f"`{name}`" for name in names) + (f" {value.strip()}" if value else "")


def options_table() -> str:
    """Markdown table: one row per field of `GenerationRequest`, in order."""
    defaults = {field.name: field.default for field in fields(GenerationRequest)}
    rows = ["| flag | keyword | what it does |", "|---|---|---|"]
    for name, option in options().items():
        text = option.help.replace("%%", "%").replace("|", "\\|")
        if option.choices:
            text += ": " + ", ".join(f"`{choice}`" for choice in option.choices)
        rows.append(f"| {_flags(option, defaults[name])} | `{name}` | {text} |")
    return "\n".join(rows) + "\n"


def with_table(text: str) -> str:
    """README `text` with the table between its markers renewed."""
    return _BLOCK.sub(lambda match: match[1] + options_table() + match[2], text)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
