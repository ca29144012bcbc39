"""`calibrate`: which steps the step cache is to compute, searched on the model itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlx_sora.cli.flags import add_debug_flag, add_quiet_flag, add_request_flags, explicit_options
from mlx_sora.cli.progress import Bars


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "calibrate",
        help="search schedules for --step-cache table:N",
        description="Search in which steps the blocks of a model are best run, on a few prompts, "
        "for every number of such steps: one small JSON file per number of steps and size, beside "
        "the model, which --step-cache table:N reads. Takes little longer than the exact videos.",
    )
    parser.add_argument(
        "--prompt",
        "-p",
        action="append",
        required=True,
        dest="prompts",
        metavar="TEXT",
        help="a prompt to search on; can be repeated, three or more are better than one",
    )
    parser.add_argument(
        "--reach",
        type=int,
        default=20,
        metavar="N",
        help="steps a sum may stand for, at most (default 20)",
    )
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        dest="table",
        metavar="FILE",
        help="default: in the model's folder",
    )
    add_request_flags(parser, "calibrate")
    add_quiet_flag(parser)
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, write the table, print its path."""
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
    bars = Bars(quiet=args.quiet)
    try:
        table = calibrate(
            pipe.engine,
            requests,
            args.reach,
            lambda done: bars.note(f"{done} of {len(requests)} prompts"),
        )
    finally:
        bars.close()
    size = (table.width, table.height, table.num_frames)
    path = args.table or table_path(pipe.model.path, table.steps, size)
    table.write(path)
    print(path)
    return 0
