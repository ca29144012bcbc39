"""`convert`: a model folder in another type, quantised, with a file per streamed block."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.flags import add_debug_flag, add_quiet_flag
from mlx_sora.cli.progress import Bars, human_bytes

if TYPE_CHECKING:
    from mlx_sora.manage.convert import ConversionResult

_EPILOG = """\
Quantised are the linear layers in the blocks of T5 and STDiT, in groups of 64 weights; other
float32 matrices of both then become bfloat16, unless --dtype is given. The VAE is never changed.
An interrupted conversion continues when the command is given again.
"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "convert",
        help="write a model folder in another type, quantised, a file per block",
        description="Write a model folder again: one file per block that is streamed, in another "
        "type, with quantised weights.",
        epilog=_EPILOG,
    )
    parser.add_argument("source", metavar="SRC", help="shapes, opensora-1.2 or a folder")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write")
    add_quantize_flag(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of T5 and STDiT; default: as stored, or 16 bits with --quantize",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that is there already"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the checksums of a conversion that is there, and repeat it if it is damaged",
    )
    add_quiet_flag(parser)
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def add_quantize_flag(parser: argparse.ArgumentParser) -> None:
    """The flag that `download` has, too."""
    parser.add_argument(
        "--quantize",
        "-q",
        type=int,
        choices=(4, 8),
        metavar="BITS",
        help="bits per weight of T5's and STDiT's linear layers: 4 or 8",
    )


def run(args: argparse.Namespace) -> int:
    """Convert and print where the new model is."""
    from mlx_sora.loading.model_folder import find_model
    from mlx_sora.manage.conversion_plan import ConversionOptions
    from mlx_sora.manage.convert import convert
    from mlx_sora.manage.download import DownloadProgress

    bars = Bars(quiet=args.quiet)
    try:
        made = convert(
            find_model(args.source),
            args.target,
            ConversionOptions(args.quantize, args.dtype),
            overwrite=args.overwrite,
            check=args.check,
            on_progress=lambda *facts: bars.show(DownloadProgress(*facts)),
        )
    except KeyboardInterrupt:
        bars.close()
        bars.note("What is finished is kept; the same command continues.")
        raise
    finally:
        bars.close()
    note_result(bars, made)
    print(made.path)
    return 0


def note_result(bars: Bars, made: ConversionResult) -> None:
    """What became of the conversion, in a line."""
    if not made.is_new:
        bars.note("already converted")
        return
    kept = f", {made.reused_files} files of an earlier attempt kept" if made.reused_files else ""
    bars.note(f"{human_bytes(made.nbytes)} written{kept}")
