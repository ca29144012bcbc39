"""`reconstruct`: encode and decode a video with the VAE alone, and compare."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

from mlx_sora.cli.edit import suffix_of
from mlx_sora.cli.flags import Parser, add_request_flags, explicit_options
from mlx_sora.cli.generate import (
    add_dry_run_flag,
    add_progress_flags,
    choose_renderer,
    open_pipeline,
)
from mlx_sora.cli.plans import show_plans
from mlx_sora.cli.progress import QuietRenderer
from mlx_sora.distributed.group import Ranks
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.events import Event, Finished
from mlx_sora.video import Video
from mlx_sora.video.output_template import escape_template


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser: Parser = commands.add_parser(
        "reconstruct",
        help="encode and decode a video with the VAE alone",
        description="Encode and decode a video or an image with the VAE alone, and print PSNR and "
        "SSIM of the decoded frames to the encoded ones, before the file is compressed. Size, "
        "length and frame rate are those of the video.",
    )
    parser.add_argument(
        "video", type=os.path.expanduser, metavar="VIDEO", help="a video or an image"
    )
    add_request_flags(parser, "reconstruct")
    add_dry_run_flag(parser)
    parser.add_argument(
        "--json", action="store_true", help="print path, PSNR, SSIM and cost as JSON on stdout"
    )
    add_progress_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the reconstruction, or plan it with --dry-run; return the exit code."""
    from mlx_sora.pipeline.reconstruct import prepare_reconstruction, stream_reconstruction

    request, ranks = read_request(args), Ranks()
    result = ResultRenderer() if args.json else None
    with closing(choose_renderer(args, ranks, result)) as renderer:
        pipeline = open_pipeline(ranks, request, renderer, plan=args.dry_run)
        if args.dry_run:
            runs = [prepare_reconstruction(pipeline.engine, args.video, request)]
            show_plans(ranks, runs, renderer, as_json=args.json or args.json_events)
            return 0
        with closing(stream_reconstruction(pipeline.engine, args.video, request)) as events:
            for event in events:
                renderer.handle(event)
    return 0


class ResultRenderer(QuietRenderer):
    """Renderer that prints only the result, as JSON on stdout."""

    def handle(self, event: Event) -> None:
        if isinstance(event, Finished):
            print(json.dumps(result_record(event.video)), flush=True)


def read_request(args: argparse.Namespace) -> GenerationRequest:
    """Return the options of the flags. Raises UsageError."""
    from mlx_sora.pipeline.reconstruct import reconstruction_request

    values = explicit_options(args)
    default = f"{Path(args.video).stem}-reconstructed{suffix_of(args.video)}"
    return reconstruction_request({"output": escape_template(default), **values})


def result_record(video: Video) -> dict[str, Any]:
    """Return what --json prints; bytes and seconds are those of each stage."""
    found = {"path": str(video.path), "width": video.width, "height": video.height}
    found |= {"num_frames": video.num_frames, "fps": video.fps}
    found |= {name: video.metadata["reconstruction"][name] for name in ("psnr", "ssim")}
    seconds = {stage: round(value, 3) for stage, value in video.timings.items()}
    return found | {"seconds": seconds, "peak_memory": dict(video.memory)}
