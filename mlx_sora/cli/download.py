"""`download`: the published model, from the hub into the folder of models."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.convert import add_quantize_flag, note_result
from mlx_sora.cli.flags import add_debug_flag, add_quiet_flag
from mlx_sora.cli.progress import Bars, human_bytes
from mlx_sora.errors import UsageError

if TYPE_CHECKING:
    from mlx_sora.manage.download import DownloadResult

#: Also `mlx_sora.loading.model_folder.PUBLISHED`, which is not imported for the sake of --help.
MODEL = "opensora-1.2"

_EPILOG = """\
--quantize keeps the download beside the quantised model, opensora-1.2-8bit or -4bit, which is
converted again from it without the network; --remove-original removes it.
Parts are transformer, vae, text_encoder and tokenizer. $MLX_SORA_SOURCE_TRANSFORMER and so on name
sources as --source does; $MLX_SORA_WEIGHTS names the folder of models, $HF_ENDPOINT the server,
$HF_TOKEN a login. An interrupted download continues when the command is given again.
"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "download",
        help="get the published model (about 25 GB)",
        description="Get the published model. Nothing is fetched that is there already, and the "
        "model appears under its name only when all of it is there and verified.",
        epilog=_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL}")
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="PART=REPO",
        help="take a part from elsewhere: PART=[REPO][@REVISION][:FOLDER]; may be repeated",
    )
    parser.add_argument("--endpoint", metavar="URL", help="server to ask instead of the hub")
    add_quantize_flag(parser)
    parser.add_argument(
        "--remove-original",
        action="store_true",
        help="with --quantize: remove the download once the quantised model is whole",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the checksums of what is there, and fetch again what is damaged",
    )
    add_quiet_flag(parser)
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Get the model and print where it is."""
    if args.model != MODEL:
        raise UsageError(
            f"{args.model!r} cannot be downloaded.",
            f"{MODEL} can; shapes is bundled, any other model is a folder of yours.",
        )
    if args.remove_original and args.quantize is None:
        raise UsageError("--remove-original goes with --quantize.", "Add --quantize 8 or 4.")
    from mlx_sora.loading.model_folder import weights_root
    from mlx_sora.manage.download import download, download_quantized
    from mlx_sora.manage.hub import Hub
    from mlx_sora.manage.sources import choose_endpoint, choose_sources

    sources, hub = choose_sources(args.source), Hub(choose_endpoint(args.endpoint))
    bars, obtained = Bars(quiet=args.quiet), None
    outcome: DownloadResult | None
    try:
        if args.quantize is None:
            outcome = download(weights_root(), sources, hub, bars.show, check=args.check)
        else:
            obtained = download_quantized(
                weights_root(),
                sources,
                hub,
                bars.show,
                args.quantize,
                check=args.check,
                remove_original=args.remove_original,
            )
            outcome = obtained.download
    except KeyboardInterrupt:
        bars.close()
        bars.note("What has arrived is kept; the same command continues.")
        raise
    finally:
        bars.close()
    if outcome is not None and outcome.is_new:
        bars.note(f"{human_bytes(outcome.fetched_bytes)} fetched, everything verified")
    else:
        bars.note("already here" + (", all checksums fit" if args.check else ""))
    path = None if outcome is None else outcome.path
    if obtained is not None:
        path = obtained.conversion.path
        note_result(bars, obtained.conversion)
        if obtained.original_removed:
            bars.note("the download is removed")
    print(path)
    return 0
