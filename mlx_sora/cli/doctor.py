"""`doctor`: what is wrong with a model, and the command that mends it."""

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
        help="check a model's files and say how to mend them",
        description="Check a model: parts, configurations, names, shapes and types, checksums, NaN "
        "and Inf, one block of each network. Exit code 4 when something is wrong.",
    )
    parser.add_argument(
        "path",
        nargs="?",
        metavar="MODEL",
        help="shapes, opensora-1.2 or a folder; default: opensora-1.2 when downloaded, else shapes",
    )
    parser.add_argument("--quick", action="store_true", help="do not read the weights")
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one line per finding; 0 when there is nothing to mend."""
    from mlx_sora.manage.doctor import diagnose, find_folder
    from mlx_sora.manage.download import DownloadProgress

    bars = Bars(quiet=not sys.stderr.isatty())
    errors = 0
    try:
        folder = find_folder(args.path)
        for finding in diagnose(
            folder, quick=args.quick, on_progress=lambda *facts: bars.show(DownloadProgress(*facts))
        ):
            bars.close()
            fix = f" Mend it: {finding.fix}" if finding.fix else ""
            line = f"{_MARKS[finding.level]:<8}{finding.subject:<13}{finding.message}{fix}"
            print(printable(line))
            errors += finding.level == "error"
    finally:
        bars.close()
    return WeightsError.exit_code if errors else 0
