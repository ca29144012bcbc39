"""`edit`: change what a video shows."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

from mlx_sora.cli.flags import add_request_flags, explicit_options
from mlx_sora.cli.generate import (
    add_dry_run_flag,
    add_progress_flags,
    choose_renderer,
    open_pipeline,
)
from mlx_sora.cli.interrupts import explain_interrupt
from mlx_sora.cli.plans import show_plans
from mlx_sora.cli.ranks import broadcast_request
from mlx_sora.distributed.group import init_ranks
from mlx_sora.request.edit import INJECT_STEPS, SAMPLER, EditRequest
from mlx_sora.video.output_template import escape_template
from mlx_sora.video.reader import is_video


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "edit",
        help="change what a video shows",
        description="Change what a video shows. --source-prompt describes the video and --prompt "
        "the result, in the same words except for the change. Defaults: length and fps of the "
        f"video, --sampler {SAMPLER}, everything else as in the model.",
    )
    parser.add_argument("video", metavar="VIDEO", help="a video or an image")
    parser.add_argument(
        "--source-prompt", default="", metavar="TEXT", help="description of the video"
    )
    parser.add_argument(
        "--inject-steps",
        type=int,
        metavar="N",
        help="first steps in which spatial attention uses the values of the video: more steps keep "
        f"the layout better, change less and need more memory; default: {INJECT_STEPS}",
    )
    add_request_flags(parser, "edit")
    add_dry_run_flag(parser)
    add_progress_flags(parser)
    parser.set_defaults(run=run, parallel_run=True)


def run(args: argparse.Namespace) -> int:
    """Make the edit, or plan it with --dry-run, on all ranks; return the exit code."""
    ranks = init_ranks()
    with ranks.watchdog_scope():
        edit = broadcast_request(ranks, EditRequest, lambda: read_edit(args), args)
        with closing(choose_renderer(args, ranks)) as renderer:
            pipeline = open_pipeline(ranks, edit.target, renderer, plan=args.dry_run)
            if args.dry_run:
                runs = map(pipeline.prepare_edit, [edit])
                show_plans(ranks, runs, renderer, as_json=args.json_events)
                return 0
            with explain_interrupt(lambda: "Nothing was written."):
                for event in pipeline.hash_weights([edit.target]):
                    renderer.handle(event)
                with closing(pipeline.stream_edit(edit)) as events:
                    for event in events:
                        renderer.handle(event)
        return int(ranks.broadcast_object(0))


def read_edit(args: argparse.Namespace) -> EditRequest:
    """Return the edit of the flags, checked as far as possible without a model."""
    flags = explicit_options(args)
    flags.setdefault("output", default_output(args.video))
    own = {"source_prompt": args.source_prompt, "inject_steps": args.inject_steps}
    edit = EditRequest.from_options(args.video, flags | own)
    edit.validate()
    return edit


def default_output(video: str) -> str:
    """Return the output template of an edit of `video`: in the working folder, without fields."""
    return escape_template(f"{Path(video).stem}-edited{suffix_of(video)}")


def suffix_of(video: str) -> str:
    """Return the suffix of an output that is made from `video`. Raises UsageError."""
    return ".mp4" if is_video(video) else ".png"
