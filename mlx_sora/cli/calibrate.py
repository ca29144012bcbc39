"""`calibrate`: tables of the step cache, token merging and widths of layers; the preview map."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.awake import add_sleep_flag
from mlx_sora.cli.flags import (
    add_debug_flag,
    add_prompts_flag,
    add_quiet_flag,
    add_request_flags,
    explicit_options,
)
from mlx_sora.cli.progress import open_bar
from mlx_sora.errors import UsageError
from mlx_sora.request.generation import GenerationRequest, label

if TYPE_CHECKING:
    from mlx_sora.pipeline.pipeline import Pipeline


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "calibrate",
        help="make tables for --step-cache table:N, --tdtm table:SPEED, --quantize mixed:BITS, or "
        "fit previews",
        description="Find, for each N, the best N steps in which to run the transformer blocks, "
        "on a few prompts. Writes a small JSON file, by default into the model folder, that "
        "--step-cache table:N uses for the same number of steps and size. Takes little longer than "
        "making the videos. With --tdtm SPEED: find what token merging may merge, for --tdtm "
        "table:SPEED; takes nine times as long. With --bits: measure the sensitivity of each "
        "layer to fewer bits, for --quantize mixed:BITS. With --preview: fit the map that shows "
        "previews without the VAE.",
    )
    add_prompts_flag(
        parser, "prompt to search on; repeat it for several prompts, three or more are best"
    )
    parser.add_argument(
        "--reach",
        type=int,
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
    parser.add_argument(
        "--overwrite", dest="replace", action="store_true", help="replace an existing file"
    )
    parser.add_argument(
        "--preview",
        action="store_true",
        help="fit the map behind --preview-every to the VAE of the model; takes a minute or so",
    )
    parser.add_argument(
        "--material",
        nargs="+",
        default=[],
        type=os.path.expanduser,
        metavar="FILE",
        help="videos and images to fit the map to; default: drawn shapes and patterns",
    )
    _add_table_flags(parser)
    add_request_flags(parser, "calibrate")
    add_quiet_flag(parser)
    parser.hide(add_sleep_flag(parser))
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def _add_table_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bits",
        action="store_true",
        help="measure the sensitivity of each layer to fewer bits, for --quantize mixed:BITS; ten "
        "steps are enough",
    )
    parser.add_argument(
        "--tdtm",
        type=float,
        dest="speed",
        metavar="SPEED",
        help="make a table of token merging for this speed of the steps, such as 1.1; the table "
        "serves all lower speeds too",
    )
    parser.add_argument(
        "--motion-check",
        action="store_true",
        help="after --tdtm, make the videos with and without merging, and print their PSNR and how "
        "much of the motion remains",
    )


def run(args: argparse.Namespace) -> int:
    """Write a table, or the preview map, and print the path."""
    print(_fit_preview(args) if args.preview else _make_table(args))
    return 0


def _make_table(args: argparse.Namespace) -> Path:
    from mlx_sora.accel.merging_table import FOLDER as MERGING
    from mlx_sora.accel.schedules import FOLDER as STEP_CACHE
    from mlx_sora.accel.schedules import table_path
    from mlx_sora.loading.quantization_choice import SENSITIVITIES
    from mlx_sora.pipeline.calibrate import REACH, calibrate, requests_for
    from mlx_sora.pipeline.pipeline import Pipeline
    from mlx_sora.pipeline.sensitivity import measure_sensitivities
    from mlx_sora.utils.obstacles import check_result_file

    _check_options(args)
    requests = requests_for(args.prompts, explicit_options(args))
    for request in requests:
        request.validate()
    pipeline = Pipeline.from_pretrained(requests[0].model, dtype=requests[0].dtype)
    settings = pipeline.prepare(requests[0]).settings
    size = (*settings.geometry.size, settings.geometry.num_frames)
    folder = STEP_CACHE if args.speed is None else MERGING
    default = table_path(pipeline.model.path, settings.steps, size, folder)
    if args.bits:
        default = pipeline.model.path / SENSITIVITIES
    path = Path(args.table) if args.table else default
    check_result_file(path, overwrite=args.replace)

    def show_progress(done: int) -> None:
        if not args.quiet:
            print(f"{done} of {len(requests)} prompts done", file=sys.stderr)

    if args.bits:
        found = measure_sensitivities(pipeline.engine, requests, show_progress)
        return found.write(path, overwrite=args.replace)
    if args.speed is not None:
        return _search_merging(args, pipeline, requests, path, show_progress)
    table = calibrate(pipeline.engine, requests, args.reach or REACH, show_progress)
    return table.write(path, overwrite=args.replace)


def _check_options(args: argparse.Namespace) -> None:
    """Raise UsageError for options of tables that are missing, out of range or of another table."""
    if args.material:
        raise UsageError("--material is for --preview.", "Add --preview, or leave it out.")
    if not args.prompts:
        raise UsageError("--prompt is missing.", "Give --prompt TEXT, or --preview.")
    if args.bits and (args.speed, args.reach) != (None, None):
        raise UsageError("--bits goes without --tdtm and --reach.", "Leave those out.")
    if args.speed is None:
        if args.motion_check:
            raise UsageError("--motion-check is for --tdtm.", "Add --tdtm 1.1, or leave it out.")
        if args.reach is not None and not 1 <= args.reach <= 100:
            raise UsageError(f"--reach {args.reach} is out of range.", "Give 1 to 100.")
        return
    if args.reach is not None:
        raise UsageError("--reach has no effect with --tdtm.", "Leave it out.")
    if not 1.001 <= args.speed <= 2:
        raise UsageError(f"--tdtm {args.speed:g} is out of range.", "Give 1.001 to 2.")


def _search_merging(
    args: argparse.Namespace,
    pipeline: Pipeline,
    requests: list[GenerationRequest],
    path: Path,
    show_progress: Callable[[int], None],
) -> Path:
    from mlx_sora.pipeline.calibrate_merging import calibrate_merging, check_motion
    from mlx_sora.request.techniques import Tdtm

    table = calibrate_merging(pipeline.engine, requests, args.speed, show_progress)
    path = table.write(path, overwrite=args.replace)
    if not args.quiet:
        text = "estimated error of the latents at {:.3f} times the speed of the steps: {:.2%}"
        print(text.format(table.parts[-1].speed, table.parts[-1].error), file=sys.stderr)
    if args.motion_check:
        tdtm = Tdtm("table", speed=args.speed, file=str(path))
        print(check_motion(pipeline, requests, tdtm), file=sys.stderr)
    return path


def _fit_preview(args: argparse.Namespace) -> Path:
    from mlx_sora.loading.model_folder import find_model
    from mlx_sora.loading.preview_map import save_preview_map
    from mlx_sora.pipeline.preview_fit import fit_model, material_clips
    from mlx_sora.utils.obstacles import check_result_file
    from mlx_sora.video.preview import PREVIEW_FILE

    others = [label(name) for name in explicit_options(args) if name != "model"]
    own = {"--tdtm": args.speed, "--motion-check": args.motion_check or None, "--reach": args.reach}
    own |= {"--bits": args.bits or None}
    others += [name for name, value in own.items() if value is not None]
    if args.prompts or others:
        raise UsageError(
            f"{(*others, '--prompt')[0]} has no effect on the preview map.", "Leave it out."
        )
    model = find_model(getattr(args, "model", None))
    path = Path(args.table) if args.table else model.path / PREVIEW_FILE
    check_result_file(path, overwrite=args.replace)
    clips = material_clips(model, args.material)
    bars: dict[str, Any] = {}

    def show_progress(stage: str, done: int, total: int) -> None:
        if args.quiet:
            return
        if stage not in bars:
            bars[stage] = open_bar(total=total, desc=stage)
        bars[stage].update(done - bars[stage].n)
        if done == total:
            bars[stage].close()

    found = fit_model(model, clips, show_progress)
    if not args.quiet:
        text = (
            f"previews are {found.psnr:.1f} dB from the VAE's frames, on clips left out of the fit"
        )
        print(text, file=sys.stderr)
    return save_preview_map(path, found, overwrite=args.replace)
