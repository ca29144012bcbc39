"""`generate`: make videos and images from prompts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.flags import (
    Parser,
    add_debug_flag,
    add_quiet_flag,
    add_request_flags,
    build_requests,
    explicit_options,
    resolve_seed,
)
from mlx_sora.cli.progress import (
    BarRenderer,
    JsonRenderer,
    QuietRenderer,
    Renderer,
    SilentRenderer,
    plan_table,
)
from mlx_sora.cli.prompt_file import PromptFile, read_batch
from mlx_sora.cli.ranks import add_cluster_flags, broadcast_request, read_cluster, show_estimates
from mlx_sora.distributed.group import Ranks, init_ranks
from mlx_sora.errors import UsageError
from mlx_sora.geometry import parse_frames
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.events import RequestFailed
from mlx_sora.video.output_path import DEFAULT_OUTPUT, check_output, fill_template, output_path

if TYPE_CHECKING:
    from mlx_sora.memory.plan import Plan
    from mlx_sora.pipeline.pipeline import Pipeline


from mlx_sora.text.prompt import split_directives
from mlx_sora.video.metadata import read_metadata, replay_options, unchanged_media


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
        metavar="FILE",
        help="replay the request in a video, an image or a JSON file; other flags override it",
    )
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="make a video for each line: a prompt, or (.jsonl) an object of options, such as "
        '{"prompt": "...", "seed": 3}; videos that exist already are skipped',
    )
    parser.add_argument(
        "--resume",
        metavar="FILE",
        help="finish the video of a checkpoint; only options that do not change it are allowed",
    )
    add_dry_run_flag(parser)
    add_cluster_flags(parser)
    add_output_flags(parser)
    parser.set_defaults(run=run, parallel_run=True)


def add_dry_run_flag(parser: argparse.ArgumentParser) -> None:
    """Add --dry-run."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what each stage would need (peak memory, bytes read, FLOPs) and stop",
    )


def add_output_flags(parser: Parser) -> None:
    """Add the flags for what the command prints while it works."""
    group = parser.add_argument_group("progress")
    loudness = group.add_mutually_exclusive_group()
    add_quiet_flag(loudness)
    parser.hide(
        loudness.add_argument("--verbose", "-v", action="store_true", help="print more messages"),
        group.add_argument("--json-events", action="store_true", help="progress as JSON lines"),
        add_debug_flag(group),
    )


def run(args: argparse.Namespace) -> int:
    """Make all videos on all ranks and return the exit code."""
    ranks = init_ranks()
    with ranks.watchdog_scope():
        return run_on_ranks(args, ranks)


def run_on_ranks(args: argparse.Namespace, ranks: Ranks) -> int:
    """Make one video after the other and return the exit code."""
    cluster = read_cluster(args)
    batch = broadcast_request(ranks, PromptFile, lambda: read_requests(args))
    renderer = choose_renderer(args, ranks)
    try:
        for path in batch.finished:
            renderer.note(f"{path} exists already")
        if batch.requests:
            first = batch.requests[0]
            with ranks.collective_errors():
                pipeline = load_pipeline(first.model, first.dtype)
            notice = environment_notice()
            if notice:
                renderer.note(notice)
            if args.dry_run:
                show_plans(ranks, lambda: map(pipeline.plan, batch.requests), args.json_events)
                if cluster is not None and ranks.is_rank0:
                    show_estimates(pipeline, batch.requests, cluster, args.json_events)
            else:
                make_videos(pipeline, batch, renderer, args.resume)
    finally:
        renderer.close()
    return int(ranks.broadcast_object(report(batch) if ranks.is_rank0 else 0))


def make_videos(
    pipeline: Pipeline, batch: PromptFile, renderer: Renderer, resume: str | None = None
) -> None:
    """Make the videos of a batch. If there are several, record failures and continue."""
    if len(batch.requests) == 1 and batch.unit == "video":
        renderer.note(f"seed {batch.requests[0].seed}")
        stream = pipeline.stream(batch.requests[0], resume)
    else:
        stream = pipeline.stream_all(batch.requests)
    # close() ends an interrupted run at once and removes its partial file.
    with closing(stream) as events:
        for event in events:
            if isinstance(event, RequestFailed):
                batch.failures[batch.number(event.index)] = event.error
            renderer.handle(event)


def report(batch: PromptFile) -> int:
    """Print a line for each failure and return the exit code."""
    for number, error in sorted(batch.failures.items()):
        print(f"error: {batch.unit} {number}: {error}", file=sys.stderr)
    if batch.failures:
        return next(iter(batch.failures.values())).exit_code
    return 0


def show_plans(ranks: Ranks, plan: Callable[[], Iterable[Plan]], as_json: bool) -> None:
    """Print the memory plan of each run."""
    with ranks.collective_errors():
        for each in plan():
            if ranks.is_rank0:
                print(json.dumps(each.to_dict()) if as_json else "\n".join(plan_table(each)))


def read_requests(args: argparse.Namespace) -> PromptFile:
    """Return the requests of the flags, checked as far as possible without a model."""
    typed = explicit_options(args)
    if args.resume is not None:
        return PromptFile([read_checkpoint(args, typed)])
    recorded = None
    if args.config_from_metadata is not None:
        recorded = recorded_options(args.config_from_metadata, typed)
    if args.prompt_file is not None:
        if "prompt" in typed:
            raise UsageError("--prompt and --prompt-file exclude each other.", "Give only one.")
        batch = read_batch(args.prompt_file, typed, recorded)
    else:
        requests = build_requests(typed, recorded)
        batch = PromptFile([_with_output(request, index) for index, request in enumerate(requests)])
    outputs = [str(request.output) for request in batch.requests]
    if len(set(outputs)) < len(outputs):
        raise UsageError(
            f"{len(outputs)} videos would be written to one file, {outputs[0]}.",
            "Put {seed} or {index} into --output, and give each seed once.",
        )
    return batch


def read_checkpoint(args: argparse.Namespace, typed: Mapping[str, Any]) -> GenerationRequest:
    """Return the request of the checkpoint of --resume."""
    from mlx_sora.pipeline.resume import resumed_request

    for name in ("config_from_metadata", "prompt_file"):
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"--resume and {flag} exclude each other.", "Give only one.")
    return _with_output(resumed_request(Path(args.resume), typed), 0)


def choose_renderer(args: argparse.Namespace, ranks: Ranks) -> Renderer:
    """Return the renderer that the flags choose. Ranks other than 0 are silent."""
    if not ranks.is_rank0:
        return SilentRenderer()
    if args.json_events:
        return JsonRenderer()
    return QuietRenderer() if args.quiet else BarRenderer()


def load_pipeline(model: str | None, dtype: str) -> Pipeline:
    """Return the pipeline. Its import, which loads MLX, is left until here."""
    from mlx_sora.pipeline.pipeline import Pipeline

    return Pipeline.from_pretrained(model, dtype=dtype)


def environment_notice() -> str:
    """Return a hint about this machine in one line, or an empty text."""
    from mlx_sora.runtime.device import blas_notice

    return blas_notice()


def _with_output(request: GenerationRequest, index: int) -> GenerationRequest:
    """Fill in the template of the output. Raises UsageError if it cannot be written."""
    request = resolve_seed(replace(request, output=request.output or DEFAULT_OUTPUT), index)
    assert request.seed is not None, "resolve_seed gives it one"
    assert request.output is not None, "it has a default"
    name = fill_template(request.output, prompt=request.prompt, seed=request.seed, index=index)
    frames = None if request.num_frames is None else parse_frames(request.num_frames)
    escaped = name.replace("{", "{{").replace("}", "}}")
    if frames is not None or Path(name).suffix or name.endswith("/"):
        path = output_path(escaped, prompt="", seed=0, num_frames=frames or 0)
        check_output(path, request.overwrite, sidecar=request.metadata, num_frames=frames)
    return replace(request, output=escaped)


def recorded_options(source: str, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the run that made the file `source`.

    Raises UsageError if an image or a video is not the recorded one: a file from somebody else
    could name any file of the user, which a replay would show.
    """
    record = read_metadata(source)
    options = replay_options(record, source)
    kept = {name: value for name, value in options.items() if name not in typed}
    present = [path for path in _media(kept) if Path(path).is_file()]
    same = unchanged_media(record, present)
    for path in present:
        if path not in same:
            raise UsageError(
                f"{path} is not the file that {source} was made with.",
                "Give --image, --video or --prompt as it was.",
            )
    return options


def _media(options: Mapping[str, Any]) -> list[str]:
    """Paths of images and videos in the options and inside the prompt."""
    request = GenerationRequest.from_dict({"prompt": "", **options})
    written = split_directives(request.prompt)[1].reference_path or ""
    given = [item.path for item in request.images] + [item.path for item in request.videos]
    return [*given, *request.references, *filter(None, written.split(";"))]
