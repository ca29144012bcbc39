"""`download`: download the published model into the folder of models."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.awake import add_sleep_flag
from mlx_sora.cli.convert import note_result
from mlx_sora.cli.flags import add_debug_flag, add_quiet_flag
from mlx_sora.cli.progress import Bars, human_bytes
from mlx_sora.errors import UsageError

if TYPE_CHECKING:
    from mlx_sora.manage.download import DownloadResult, QuantizedDownload

#: Equals `mlx_sora.loading.model_folder.PUBLISHED`, which would make --help load MLX.
MODEL = "opensora-1.2"

_EPILOG = """\
--quantize also writes opensora-1.2-8bit or -4bit and keeps the download beside it, to convert it
again without the network; --remove-original removes the download.
Parts are transformer, vae, text_encoder and tokenizer. $MLX_SORA_SOURCE_TRANSFORMER etc. set
sources as --source does; $MLX_SORA_WEIGHTS is the folder of models (default: `models` in the cache
folder of the user), $HF_ENDPOINT the server, $HF_TOKEN a login. Files that `hf download` has put
into the hub's cache are linked; with HF_HUB_OFFLINE=1 no server is asked. An interrupted download
continues when the command is run again.
"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "download",
        help="download the published model (about 25 GB)",
        description="Download the published model. Fetches only missing files. The model appears "
        "under its name when it is complete and verified.",
        epilog=_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="PART=REPO",
        help="another source of a part: PART=[REPO][@REVISION][:FOLDER]; may be repeated",
    )
    parser.add_argument("--endpoint", metavar="URL", help="server to use instead of the hub")
    parser.add_argument(
        "--quantize",
        "-q",
        type=int,
        choices=(4, 8),
        metavar="BITS",
        help="quantize the linear layers of T5 and STDiT to 4 or 8 bits per weight",
    )
    parser.add_argument(
        "--remove-original",
        action="store_true",
        help="with --quantize: remove the download when the quantized model is complete",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare checksums of an existing model; fetch damaged files again",
    )
    add_quiet_flag(parser)
    add_sleep_flag(parser)
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Download the model and print its path."""
    if args.model != MODEL:
        raise UsageError(
            f"{args.model!r} cannot be downloaded.",
            f"Give {MODEL}; `python -m mlx_sora models` lists what is here.",
        )
    if args.remove_original and args.quantize is None:
        raise UsageError("--remove-original needs --quantize.", "Add --quantize 8 or 4.")
    from mlx_sora.loading.model_folder import QUANTIZED_MODELS, model_path
    from mlx_sora.manage.download import download, download_quantized
    from mlx_sora.manage.hub import Hub
    from mlx_sora.manage.sources import choose_endpoint, choose_sources

    sources, hub = choose_sources(args.source), Hub(choose_endpoint(args.endpoint))
    quantized: QuantizedDownload | None = None
    result: DownloadResult | None
    with Bars(args.quiet, "Fetched data is kept; the same command continues.") as bars:
        if args.quantize is None:
            result = download(model_path(MODEL).parent, sources, hub, bars.show, check=args.check)
        else:
            quantized = download_quantized(
                model_path(QUANTIZED_MODELS[args.quantize]).parent,
                sources,
                hub,
                bars.show,
                args.quantize,
                check=args.check,
                remove_original=args.remove_original,
            )
            result = quantized.download
    if result is not None and result.is_new:
        linked = f"{human_bytes(result.linked_bytes)} linked from the hub's cache, "
        fetched = f"{human_bytes(result.fetched_bytes)} fetched, everything verified"
        bars.note((linked if result.linked_bytes else "") + fetched)
    else:
        bars.note("already here" + (", all checksums are right" if args.check else ""))
    if quantized is not None:
        note_result(bars, quantized.conversion)
        if quantized.original_removed:
            bars.note("the download is removed")
        print(quantized.conversion.path)
    elif result is not None:
        print(result.path)
    return 0
