"""`info`: show the model, its size and this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_sora.cli.flags import add_debug_flag
from mlx_sora.cli.generate import load_pipeline
from mlx_sora.cli.progress import human_bytes
from mlx_sora.errors import printable
from mlx_sora.request.generation import options


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "info",
        help="show the model, its size and this machine",
        description="Show the model, its size and this machine.",
    )
    model, dtype = options()["model"], options()["dtype"]
    parser.add_argument("--model", type=_model, metavar="MODEL", help=model.help)
    parser.add_argument("--dtype", choices=dtype.choices, default="auto", help=dtype.help)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def _model(text: str) -> str:
    """Read a name or folder as requests do, with their limit of a name."""
    found: str = options()["model"].convert(text)
    return found


def run(args: argparse.Namespace) -> int:
    """Print the facts of `Pipeline.info`."""
    facts = load_pipeline(args.model, args.dtype).info()
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        print("\n".join(map(printable, lines(facts))))
    return 0


def lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield `name: value` lines, with nested mappings indented and numbers made readable."""
    for name, value in facts.items():
        # Environment variables keep their names.
        title = str(name) if str(name).isupper() else str(name).replace("_", " ")
        if isinstance(value, Mapping):
            if value:
                yield f"{indent}{title}:"
                yield from lines(value, indent + "  ")
        elif isinstance(value, list | tuple):
            yield f"{indent}{title}: {'; '.join(map(str, value))}"
        elif isinstance(value, bool) or not isinstance(value, int):
            yield f"{indent}{title}: {value}"
        elif any(word in str(name) for word in ("bytes", "memory")):
            yield f"{indent}{title}: {human_bytes(value)}"
        else:
            yield f"{indent}{title}: {value:,}"
