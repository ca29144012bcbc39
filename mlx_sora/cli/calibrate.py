"""`calibrate`: search the steps in which the step cache should run the blocks."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from mlx_sora.cli.awake import add_sleep_flag
from mlx_sora.cli.flags import add_debug_flag, add_quiet_flag, add_request_flags, explicit_options


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "calibrate",
        help="search schedules for --step-cache table:N",
        description="Find, for each N, the best N steps in which to run the transformer blocks, "
        "on a few prompts. Writes a small JSON file, by default into the model folder, that "
        "--step-cache table:N uses for the same number of steps and size. Takes little longer than "
        "making the videos.",
    )
    parser.add_argument(
        "--prompt",
        "-p",
        action="append",
        required=True,
        dest="prompts",
        metavar="TEXT",
        help="prompt to search on; repeat it for several prompts, three or more are best",
    )
    parser.add_argument(
        "--reach",
        type=int,
        default=20,
        metavar="N",
        help="most steps that may use one cached residual; default: 20",
    )
    parser.add_argument(
        "--output",
        "-o",
        type=os.path.expanduser,
        dest="table",
        metavar="FILE",
        help="JSON file to write; default: in the model folder",
    )
    add_request_flags(parser, "calibrate")
    add_quiet_flag(parser)
    parser.hide(add_sleep_flag(parser))
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, write the table and print its path."""
    from mlx_sora.accel.schedules import FOLDER, table_path
    from mlx_sora.errors import UsageError
    from mlx_sora.pipeline.calibrate import calibrate, requests_for
    from mlx_sora.pipeline.pipeline import Pipeline
    from mlx_sora.utils.obstacles import check_result_file

    if not 1 <= args.reach <= 100:
        raise UsageError(f"--reach {args.reach} is out of range.", "Give 1 to 100.")
    requests = requests_for(args.prompts, explicit_options(args))
    for request in requests:
        request.validate()
    pipeline = Pipeline.from_pretrained(requests[0].model, dtype=requests[0].dtype)
    check_result_file(Path(args.table) if args.table else pipeline.model.path / FOLDER / "table")

    def show_progress(done: int) -> None:
        if not args.quiet:
            print(f"{done} of {len(requests)} prompts done", file=sys.stderr)

    table = calibrate(pipeline.engine, requests, args.reach, show_progress)
    size = (table.width, table.height, table.num_frames)
    default = table_path(pipeline.model.path, table.steps, size)
    path = Path(args.table) if args.table else default
    table.write(path)
    print(path)
    return 0
