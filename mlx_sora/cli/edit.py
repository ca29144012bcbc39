"""`edit`: a video and two prompts in, the changed video out."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

from mlx_sora.cli.flags import add_request_flags, explicit_options
from mlx_sora.cli.generate import (
    add_dry_run_flag,
    add_output_flags,
    choose_renderer,
    environment_notice,
    load_pipeline,
    show_plans,
)
from mlx_sora.cli.ranks import broadcast_request
from mlx_sora.distributed.group import Ranks, init_ranks
from mlx_sora.request.edit import INJECT_STEPS, SAMPLER, EditRequest
from mlx_sora.video.reader import is_video


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "edit",
        help="change what a video shows",
        description="Change what a video shows: --source-prompt says what that is, --prompt what "
        "it shall be; word them alike but for the change. What is left open is the model's "
        f"default, the video's own length and fps, and --sampler {SAMPLER}.",
    )
    parser.add_argument("video", metavar="VIDEO", help="a video, or a picture")
    parser.add_argument(
        "--source-prompt", default="", metavar="TEXT", help="what the video shows now"
    )
    parser.add_argument(
        "--inject-steps",
        type=int,
        metavar="N",
        help="in how many of the first steps attention within frames uses the video's values: more "
        f"holds the layout better and changes less; needs memory (default {INJECT_STEPS})",
    )
    add_request_flags(parser, "edit")
    add_dry_run_flag(parser)
    add_output_flags(parser)
    parser.set_defaults(run=run, parallel_run=True)


def run(args: argparse.Namespace) -> int:
    """Make one edit, on all ranks that were launched."""
    ranks = init_ranks()
    with ranks.watchdog_scope():
        return follow(args, ranks)


def follow(args: argparse.Namespace, ranks: Ranks) -> int:
    """Make the edit; the exit code."""
    edit = broadcast_request(ranks, EditRequest, lambda: request_of(args))
    renderer = choose_renderer(args, ranks)
    try:
        with ranks.collective_errors():
            pipeline = load_pipeline(edit.target.model, edit.target.dtype)
        notice = environment_notice()
        if notice:
            renderer.note(notice)
        if args.dry_run:
            show_plans(ranks, lambda: [pipeline.plan_edit(edit)], args.json_events)
            return 0
        with closing(pipeline.stream_edit(edit)) as events:
            for event in events:
                renderer.handle(event)
    finally:
        renderer.close()
    return int(ranks.broadcast_object(0))


def request_of(args: argparse.Namespace) -> EditRequest:
    """The edit that the flags mean, checked as far as that goes without a model."""
    typed = explicit_options(args)
    typed.setdefault("output", default_output(args.video))
    own = {"source_prompt": args.source_prompt, "inject_steps": args.inject_steps}
    edit = EditRequest.from_options(args.video, typed | own)
    edit.validate()
    return edit


def default_output(video: str) -> str:
    """Where an edit of `video` goes: into this folder, as a template without fields."""
    stem = Path(video).stem.replace("{", "{{").replace("}", "}}")
    return f"{stem}-edited{'.mp4' if is_video(video) else '.png'}"
