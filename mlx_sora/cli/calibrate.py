"""`calibrate`: search the steps in which the step cache should run the blocks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlx_sora.cli.flags import add_debug_flag, add_quiet_flag, add_request_flags, explicit_options
from mlx_sora.cli.progress import Bars


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "calibrate",
        help="search schedules for --step-cache table:N",
        description="Search the N steps that should run the transformer blocks, for every N, on a "
        "few prompts. Writes a small JSON file for a number of steps and a size into the model "
        "folder, which --step-cache table:N reads. Takes little longer than the exact videos.",
    )
    parser.add_argument(
        "--prompt",
        "-p",
        action="append",
        required=True,
        dest="prompts",
        metavar="TEXT",
        help="prompt to search on; can be repeated, three or more are better than one",
    )
    parser.add_argument(
        "--reach",
        type=int,
        default=20,
        metavar="N",
        help="most steps that may use one cached residual (default 20)",
    )
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        dest="table",
        metavar="FILE",
        help="table to write; default: in the model folder",
    )
    add_request_flags(parser, "calibrate")
    add_quiet_flag(parser)
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, write the table and print its path."""
    from mlx_sora.accel.schedules import table_path
    from mlx_sora.errors import UsageError
    from mlx_sora.pipeline.calibrate import calibrate, requests_for
    from mlx_sora.pipeline.pipeline import Pipeline

    if not 1 <= args.reach <= 100:
        raise UsageError(f"--reach {args.reach} is out of range.", "Give 1 to 100.")
    requests = requests_for(args.prompts, explicit_options(args))
    for request in requests:
        request.validate()
    pipe = Pipeline.from_pretrained(requests[0].model, dtype=requests[0].dtype)
    with Bars(args.quiet) as bars:
        table = calibrate(
            pipe.engine,
            requests,
            args.reach,
            lambda done: bars.note(f"{done} of {len(requests)} prompts"),
        )
    size = (table.width, table.height, table.num_frames)
    path = args.table or table_path(pipe.model.path, table.steps, size)
    table.write(path)
    print(path)
    return 0
