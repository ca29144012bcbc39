"""`models`: list the models on this machine, and remove one."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.flags import add_debug_flag
from mlx_sora.cli.progress import human_bytes
from mlx_sora.errors import UsageError, printable

if TYPE_CHECKING:
    from mlx_sora.manage.models import ModelFacts, Removal

_EPILOG = """\
Named models lie in $MLX_SORA_WEIGHTS, else in the folder `models` of the cache folder
(~/Library/Caches/mlx_sora on macOS, ~/.cache/mlx_sora on Linux), and in weights/ of a clone.
"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "models",
        help="list the models on this machine, or remove one",
        description="List the models: name, size on disk, bits per weight, whether a run of the "
        "defaults fits this machine's memory and with which options, and where each comes from.",
        epilog=_EPILOG,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_debug_flag(parser)
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    remove = actions.add_parser(
        "rm",
        help="remove a model from the disk",
        description="Remove a model, and what an unfinished download or conversion of it left.",
    )
    remove.add_argument("name", metavar="NAME", help="name that `models` lists")
    remove.add_argument("--yes", "-y", action="store_true", help="do not ask")
    add_debug_flag(remove)
    remove.set_defaults(run=run_removal)


def run(args: argparse.Namespace) -> int:
    """Print one line per model."""
    from mlx_sora.manage.models import list_models

    found = list(list_models())
    if args.json:
        print(json.dumps({"models": [model.to_dict() for model in found]}, indent=2))
        return 0
    rows = [("name", "size", "bits", "fits", "origin"), *map(_row, found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]))
    return 0


def _row(model: ModelFacts) -> tuple[str, ...]:
    size = "-" if not model.nbytes else human_bytes(model.nbytes)
    if model.fit is None:
        fits = "-"
    elif model.fit.fits:
        fits = f"with {model.fit.options}" if model.fit.options else "yes"
    else:
        fits = f"no, needs {human_bytes(model.fit.needed)}"
    bits = "-" if model.bits is None else str(model.bits)
    cells = (model.name, size, bits, fits, model.problem or model.origin)
    return tuple(map(printable, cells))


def run_removal(args: argparse.Namespace) -> int:
    """Remove a model after a confirmation, and print the bytes freed."""
    from mlx_sora.manage.models import remove_model

    removal = remove_model(args.name, lambda removal: args.yes or _confirm(removal))
    if removal is None:
        print("Nothing was removed.", file=sys.stderr)
        return 1
    print(f"{printable(removal.name)} removed, {human_bytes(removal.freed)} freed")
    return 0


def _confirm(removal: Removal) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("Nobody can be asked: this is no terminal.", "Add --yes.")
    places = ", ".join(map(str, removal.folders))
    question = f"Remove {places} ({human_bytes(removal.freed)})? [y/N]"
    print(printable(question), end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
