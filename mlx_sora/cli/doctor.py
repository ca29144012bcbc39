"""`doctor`: check a model and show the commands that repair it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mlx_sora.cli.flags import add_debug_flag
from mlx_sora.cli.progress import Bars
from mlx_sora.errors import WeightsError, printable

_MARKS = {"ok": "ok", "note": "note", "warning": "WARNING", "error": "ERROR"}


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "doctor",
        help="check a model's files and show how to repair them",
        description="Check a model: parts, configurations, names, shapes and types, checksums, NaN "
        "and Inf, one block of each network. The exit code is 4 if there is an error.",
    )
    parser.add_argument(
        "path",
        nargs="?",
        metavar="MODEL",
        help="shapes, opensora-1.2 or a folder; default: opensora-1.2 if downloaded, else shapes",
    )
    parser.add_argument("--quick", action="store_true", help="do not read the weights")
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one line per result; return 0 without errors."""
    from mlx_sora.manage.doctor import diagnose, find_folder

    errors = 0
    with Bars(quiet=not sys.stderr.isatty()) as bars:
        for result in diagnose(find_folder(args.path), quick=args.quick, on_progress=bars.show):
            bars.close()
            fix = f" Repair: {result.fix}" if result.fix else ""
            line = f"{_MARKS[result.level]:<8}{result.subject:<13}{result.message}{fix}"
            print(printable(line))
            errors += result.level == "error"
    return WeightsError.exit_code if errors else 0
