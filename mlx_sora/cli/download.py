"""`download`: the published model, from the hub into the folder of models."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.render import human_bytes
from mlx_sora.errors import UsageError

if TYPE_CHECKING:
    from mlx_sora.loading.download import Progress

#: Also `mlx_sora.loading.model_folder.PUBLISHED`, which is not imported for the sake of --help.
MODEL = "opensora-1.2"

_EPILOG = """\
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
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the checksums of what is there, and fetch again what is damaged",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but the path")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Get the model and print where it is."""
    if args.model != MODEL:
        raise UsageError(
            f"{args.model!r} cannot be downloaded.",
            f"{MODEL} can; shapes is bundled, any other model is a folder of yours.",
        )
    from mlx_sora.loading.download import download
    from mlx_sora.loading.hub import Hub
    from mlx_sora.loading.model_folder import weights_root
    from mlx_sora.loading.sources import choose_endpoint, choose_sources

    sources, hub = choose_sources(args.source), Hub(choose_endpoint(args.endpoint))
    bars = Bars(quiet=args.quiet)
    try:
        outcome = download(weights_root(), sources, hub, bars.show, check=args.check)
    except KeyboardInterrupt:
        bars.close()
        bars.note("What has arrived is kept; the same command continues.")
        raise
    finally:
        bars.close()
    if outcome.changed:
        bars.note(f"{human_bytes(outcome.fetched)} fetched, everything verified")
    else:
        bars.note("already here" + (", all checksums fit" if args.check else ""))
    print(outcome.path)
    return 0


class Bars:
    """One bar per file on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._shown: tuple[str, str] | None = None

    def note(self, text: str) -> None:
        """A line beside the bars."""
        if not self._quiet:
            print(text, file=sys.stderr)

    def show(self, progress: Progress) -> None:
        """Draw what the download reports."""
        if self._quiet:
            return
        if self._shown != (progress.action, progress.path):
            self.close()
            self._shown = (progress.action, progress.path)
            self._bar = self._open(progress)
        self._bar.update(progress.done - self._bar.n)

    def close(self) -> None:
        """End the bar on the screen."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._shown = None

    def _open(self, progress: Progress) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=progress.total,
            # What was there before counts as done, not as speed.
            initial=progress.done if progress.action == "fetch" else 0,
            desc=f"{progress.action} {progress.path}",
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )
