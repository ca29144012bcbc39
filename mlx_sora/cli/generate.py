"""`generate`: make videos and images from prompts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.awake import add_sleep_flag
from mlx_sora.cli.display import Display, add_display_flags
from mlx_sora.cli.enhance import add_enhance_flag
from mlx_sora.cli.flags import Parser, add_debug_flag, add_quiet_flag, add_request_flags
from mlx_sora.cli.interrupts import explain_interrupt, interrupted_run
from mlx_sora.cli.opensora import add_opensora_flags
from mlx_sora.cli.plans import note_unread_weights, show_plans
from mlx_sora.cli.progress import (
    BarRenderer,
    JsonRenderer,
    QuietRenderer,
    Renderer,
    SilentRenderer,
)
from mlx_sora.cli.ranks import add_cluster_flags, broadcast_request, read_cluster, show_estimates
from mlx_sora.cli.requests import RequestBatch, name_origins, read_requests
from mlx_sora.distributed.group import Ranks, init_ranks
from mlx_sora.errors import WeightsError
from mlx_sora.runtime.events import Event, Finished, RequestFailed

if TYPE_CHECKING:
    from mlx_sora.pipeline.pipeline import Pipeline
    from mlx_sora.request.generation import GenerationRequest


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "generate",
        help="make a video or an image from a prompt",
        description="Make a video (or, with --num-frames 1, an image) from a prompt. "
        "Options that are not given take the model's defaults.",
    )
    add_request_flags(parser, "generate")
    parser.add_argument(
        "--config-from-metadata",
        "-C",
        type=os.path.expanduser,
        metavar="FILE",
        help="repeat the request that is recorded in a video, an image or a JSON file; flags "
        "override its options",
    )
    parser.add_argument(
        "--prompt-file",
        type=os.path.expanduser,
        metavar="FILE",
        help="make a video for each line, which is a prompt or, in .jsonl, an object of options "
        'such as {"prompt": "...", "seed": 3}; skips existing outputs',
    )
    parser.add_argument(
        "--resume",
        type=os.path.expanduser,
        metavar="FILE",
        help="continue from a checkpoint; only options that do not change the video are allowed",
    )
    add_enhance_flag(parser)
    add_dry_run_flag(parser)
    add_cluster_flags(parser)
    add_progress_flags(parser)
    add_opensora_flags(parser)
    parser.set_defaults(run=run, parallel_run=True)


def add_dry_run_flag(parser: argparse.ArgumentParser) -> None:
    """Add --dry-run."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print peak memory, bytes read, FLOPs and, after `doctor --machine`, seconds of each "
        "stage, and stop; the published model need not be downloaded",
    )


def add_progress_flags(parser: Parser) -> None:
    """Add --quiet, --verbose, --show, --open, --json-events, --allow-sleep and --debug."""
    group = parser.add_argument_group("progress")
    add_display_flags(group)
    verbosity = group.add_mutually_exclusive_group()
    add_quiet_flag(verbosity)
    parser.hide(
        verbosity.add_argument(
            "--verbose",
            "-v",
            action="store_true",
            help="also print versions, folders, the plan, streams and decisions",
        ),
        group.add_argument(
            "--json-events", action="store_true", help="print progress as lines of JSON on stdout"
        ),
        add_sleep_flag(group),
        add_debug_flag(group),
    )


def run(args: argparse.Namespace) -> int:
    """Make the videos, or plan them with --dry-run, on all ranks; return the exit code."""
    ranks = init_ranks()
    with ranks.watchdog_scope(), name_origins(args):
        cluster = read_cluster(args)
        batch = broadcast_request(ranks, RequestBatch, lambda: read_requests(args), args)
        with closing(choose_renderer(args, ranks)) as renderer:
            for note in batch.notes:
                renderer.note(note)
            for path in batch.existing:
                renderer.note(f"skipped: {path} exists already")
            if batch.requests:
                pipeline = open_pipeline(ranks, batch.requests[0], renderer, plan=args.dry_run)
                if args.dry_run:
                    runs = map(pipeline.prepare, batch.requests)
                    show_plans(ranks, runs, renderer, as_json=args.json_events)
                    note_unread_weights(pipeline, batch.requests, renderer)
                    if cluster is not None and ranks.is_rank0:
                        show_estimates(pipeline, batch.requests, cluster, args.json_events)
                else:
                    make_videos(pipeline, batch, renderer, args.resume)
        return int(ranks.broadcast_object(report_failures(batch) if ranks.is_rank0 else 0))


def make_videos(
    pipeline: Pipeline, batch: RequestBatch, renderer: Renderer, resume: str | None
) -> None:
    """Make the videos of a batch. If there are several, record failures and continue."""
    finished, repeat = 0, batch.unit == "line"
    with (
        explain_interrupt(lambda: interrupted_run(batch.requests, finished, resume, repeat=repeat)),
        closing(_video_events(pipeline, batch, renderer, resume)) as events,
    ):
        for event in events:
            if isinstance(event, RequestFailed):
                batch.failures[batch.number(event.index)] = event.error
            finished += isinstance(event, (Finished, RequestFailed))
            renderer.handle(event)


def _video_events(
    pipeline: Pipeline, batch: RequestBatch, renderer: Renderer, resume: str | None
) -> Generator[Event, None, None]:
    yield from pipeline.hash_weights(batch.requests)
    if len(batch.requests) == 1 and batch.unit == "video":
        renderer.note(f"seed {batch.requests[0].seed}")
        stream = pipeline.stream(batch.requests[0], resume)
    else:
        stream = pipeline.stream_all(batch.requests)
    # close() ends an interrupted run at once and removes its partial file.
    with closing(stream) as events:
        yield from events


def report_failures(batch: RequestBatch) -> int:
    """Print a line for each failure and return the exit code."""
    for number, error in sorted(batch.failures.items()):
        print(f"error: {batch.unit} {number}: {error.flag_text}", file=sys.stderr)
    if batch.failures:
        return next(iter(batch.failures.values())).exit_code
    return 0


def choose_renderer(
    args: argparse.Namespace, ranks: Ranks, result: Renderer | None = None
) -> Renderer:
    """Return the renderer that the flags choose. Ranks other than 0 are silent.

    result: of a command that prints its result in a form of its own, without progress.
    """
    if not ranks.is_rank0:
        return SilentRenderer()
    renderer: Renderer = QuietRenderer() if args.quiet else BarRenderer()
    if args.json_events:
        renderer = JsonRenderer()
    return Display(result or renderer, show=args.show, open=args.open)


def open_pipeline(
    ranks: Ranks, request: GenerationRequest, renderer: Renderer, *, plan: bool = False
) -> Pipeline:
    """Return the pipeline of a request on all ranks; show a hint about this machine, if any.

    plan: for a plan only, for which the published model need not be downloaded.
    """
    with ranks.collective_errors():
        try:
            pipeline = load_pipeline(request.model, request.dtype)
        except WeightsError:
            undownloaded = undownloaded_pipeline(request, renderer) if plan else None
            if undownloaded is None:
                raise
            pipeline = undownloaded
    if notice := environment_notice():
        renderer.note(notice)
    return pipeline


def load_pipeline(model: str | None, dtype: str) -> Pipeline:
    """Return the pipeline of a model. Imports MLX, which the help does without."""
    from mlx_sora.pipeline.pipeline import Pipeline

    return Pipeline.from_pretrained(model, dtype=dtype)


def undownloaded_pipeline(request: GenerationRequest, renderer: Renderer) -> Pipeline | None:
    """Return a pipeline that plans with the published model before it is downloaded, if asked."""
    from mlx_sora.loading.published import find_undownloaded
    from mlx_sora.pipeline.pipeline import Pipeline

    model = find_undownloaded(request.model)
    if model is None:
        return None
    renderer.note(model.notice)
    return Pipeline(model, request.dtype)


def environment_notice() -> str:
    """Return a hint about this machine in one line, or an empty string."""
    from mlx_sora.runtime.device import blas_notice

    return blas_notice()
