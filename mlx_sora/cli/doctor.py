"""`doctor`: check a model and show the commands that repair it, or check this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.flags import add_debug_flag
from mlx_sora.cli.progress import Bars
from mlx_sora.errors import UsageError, WeightsError, printable

if TYPE_CHECKING:
    from mlx_sora.manage.records import Diagnostic

if TYPE_CHECKING:
    from mlx_sora.manage.records import Diagnostic

_MARKS = {"ok": "ok", "note": "note", "warning": "WARNING", "error": "ERROR"}
_MACHINE_MARKS = {"ok": "ok", "skipped": "skipped", "slow": "SLOW", "wrong": "WRONG"}


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "doctor",
        help="check a model's files, or this machine",
        description="Check a model: parts, configurations, names, shapes and types, checksums, NaN "
        "and Inf, one block of each network. Or, with --machine, check without a model that this "
        "machine computes right, and measure how fast. The exit code is 4 if there is an error.",
    )
    parser.add_argument(
        "path",
        nargs="?",
        metavar="MODEL",
        help="shapes, opensora-1.2 or a folder; default: opensora-1.2 if downloaded, else shapes",
    )
    parser.add_argument("--quick", action="store_true", help="do not read the weights")
    parser.add_argument(
        "--machine",
        action="store_true",
        help="check and measure this machine instead, without a model, in about two minutes",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one line per result; return 0 without errors."""
    if args.machine:
        if args.path is not None or args.quick:
            raise UsageError(
                "--machine checks this machine, not a model.", "Leave MODEL and --quick out."
            )
        return _check_machine(args.json)
    return _check_model(args)


def _check_model(args: argparse.Namespace) -> int:
    from mlx_sora.manage.doctor import diagnose, find_folder

    results = []
    with Bars(quiet=args.json or not sys.stderr.isatty()) as bars:
        for result in diagnose(find_folder(args.path), quick=args.quick, on_progress=bars.show):
            bars.close()
            results.append(result)
            if not args.json:
                print(_line(result))
    if args.json:
        print(json.dumps({"results": [asdict(result) for result in results]}, indent=2))
    return WeightsError.exit_code if any(r.level == "error" for r in results) else 0


def _line(result: Diagnostic) -> str:
    # Both may quote a file: neither its words nor its length may change what to type.
    finding = printable(f"{result.subject:<13}{result.message}").replace("Repair:", "Repair;")
    fix = f" Repair: {printable(result.fix)}" if result.fix else ""
    return f"{_MARKS[result.level]:<8}{finding}{fix}"


def _check_machine(as_json: bool) -> int:
    from mlx_sora.manage.machine_report import MachineReport

    report, out = MachineReport(), sys.stderr if as_json else sys.stdout

    def show_progress(name: str) -> None:
        if sys.stderr.isatty():
            print(f"measuring {name} ...", file=sys.stderr)

    for result in report.run(show_progress):
        seconds = "" if result.seconds is None else f"{result.seconds:.2f} s"
        line = f"{_MACHINE_MARKS[result.status]:<8}{result.name:<56}{seconds:>8}  {result.message}"
        if result.advice:
            line += f". {result.advice}"
        print(printable(line), file=out, flush=True)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    counts = Counter(result.status for result in report.results)
    print(", ".join(f"{counts[s]} {s}" for s in _MACHINE_MARKS) + ".", file=out)
    return WeightsError.exit_code if counts["wrong"] else 0
