"""`convert`: write a model folder in another type, quantized, one file per streamed block."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.awake import add_sleep_flag
from mlx_sora.cli.flags import add_debug_flag, add_prompts_flag, add_quiet_flag
from mlx_sora.cli.progress import Bars, human_bytes
from mlx_sora.errors import UsageError
from mlx_sora.request.generation import FLOAT_DTYPES, options

if TYPE_CHECKING:
    from mlx_sora.loading.model_folder import ModelFolder
    from mlx_sora.manage.conversion_plan import Gptq
    from mlx_sora.manage.convert import ConversionResult

_EPILOG = """\
--quantize changes the linear layers in the blocks of T5 and STDiT, and T5's table of tokens, which
gets 5 bits or more; 3 to 6 bits are rotated before rounding. Their other float32 matrices become
bfloat16, unless --dtype is given. The VAE is never changed.
An interrupted conversion continues when the command is run again.
"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "convert",
        help="convert a model to another data type or to quantized weights, one file per block",
        description="Convert a model folder to another data type or to quantized weights, with one "
        "file per streamed block.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "source", metavar="SRC", help="model to read: shapes, opensora-1.2 or a folder"
    )
    parser.add_argument(
        "target",
        metavar="DST",
        type=Path,
        nargs="?",
        help="folder to write; default: such as SRC-8bit, in the folder of models",
    )
    parser.add_argument(
        "--quantize",
        "-q",
        metavar="BITS",
        help="quantize the linear layers of T5 and STDiT to 3, 4, 5, 6 or 8 bits per weight, "
        "mxfp4, nvfp4, mxfp8, mixed:BITS (an average; needs calibrate --bits), or each network "
        "(t5=4,transformer=8)",
    )
    parser.add_argument(
        "--dtype",
        choices=FLOAT_DTYPES,
        help="data type of T5 and STDiT (with float16, T5 gets bfloat16); default: as stored, or "
        "16-bit with --quantize",
    )
    _add_gptq_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model in DST")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare checksums of an existing conversion; repeat it if a file is damaged",
    )
    add_quiet_flag(parser)
    add_sleep_flag(parser)
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def _add_gptq_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gptq",
        action="store_true",
        help="with --quantize: round each weight so that it makes up for the errors of those "
        "before it, measured on prompts; same size, nearer to the original; takes as long as a "
        "dozen videos, and a while for each layer",
    )
    add_prompts_flag(
        parser,
        "prompt for --gptq; repeat it for several, fifty varied ones are best: T5 is measured "
        "on all, the transformer on the first twelve; default: what the model's card gives",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="steps of the videos for --gptq; default: 10"
    )
    parser.add_argument(
        "--distill",
        type=int,
        metavar="N",
        help="with --gptq: then let scales and biases of the transformer learn from the original "
        "for N steps (as DWQ of mlx-lm), on the paths of all prompts; 600 are good",
    )


def run(args: argparse.Namespace) -> int:
    """Convert and print the path of the new model."""
    from mlx_sora.loading.model_folder import find_model, weights_root
    from mlx_sora.manage.conversion_plan import ConversionOptions
    from mlx_sora.manage.convert import convert

    source = find_model(args.source)
    quantize = options()["quantize"].convert(args.quantize)
    kind = f"{quantize}bit" if isinstance(quantize, int) else quantize
    gptq = _gptq(args, source)
    kinds = [kind and re.sub("[=,:]", "-", kind), args.dtype, "gptq" if gptq else None]
    if args.target is None and not any(kinds):
        raise UsageError("The new model needs a name.", "Give its folder as DST.")
    name = "-".join([source.path.resolve().name, *(kind for kind in kinds if kind)])
    with Bars(args.quiet, "Finished files are kept; the same command continues.") as bars:
        result = convert(
            source,
            args.target or weights_root() / name,
            ConversionOptions(quantize, args.dtype, gptq),
            overwrite=args.overwrite,
            check=args.check,
            on_progress=bars.show,
        )
    note_result(bars, result)
    print(result.path)
    return 0


def _gptq(args: argparse.Namespace, source: ModelFolder) -> Gptq | None:
    """Return the settings of --gptq, None without it. Raises UsageError."""
    from mlx_sora.manage.conversion_plan import Gptq

    if not args.gptq:
        asked = {"--prompt": args.prompts, "--steps": args.steps, "--distill": args.distill}
        for name in (name for name, value in asked.items() if value not in (None, [])):
            raise UsageError(f"{name} is for --gptq.", "Add --gptq, or leave it out.")
        return None
    if args.quantize is None:
        raise UsageError(
            "--gptq is for --quantize.", "Add --quantize 4 for 4 bits, or leave it out."
        )
    prompts = tuple(args.prompts) or Gptq.suggested(source.card)
    if not prompts:
        raise UsageError(
            f"{source.name} suggests no prompts for --gptq.",
            "Give --prompt TEXT; repeat it for several, fifty varied ones are best.",
        )
    given = {"steps": args.steps, "distill": args.distill}
    return Gptq(prompts, **{name: value for name, value in given.items() if value is not None})


def note_result(bars: Bars, result: ConversionResult) -> None:
    """Show the result of a conversion in one line."""
    if not result.is_new:
        bars.note("already converted")
        return
    count = result.reused_files
    reused = f", {count} files of an earlier attempt reused" if count else ""
    bars.note(f"{human_bytes(result.nbytes)} written{reused}")
