"""`generate --dry-run --ranks N`: how long a step would take on several machines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.flags import Parser
from mlx_sora.errors import UsageError
from mlx_sora.request.generation import GenerationRequest

if TYPE_CHECKING:
    from mlx_sora.distributed.cost_model import Chip, Link, StepEstimate
    from mlx_sora.pipeline.pipeline import Pipeline

#: Ranks beyond which nobody has asked; a typing error is likelier.
MAX_RANKS = 1024


@dataclass(frozen=True)
class Cluster:
    """Equal machines that nobody has started yet."""

    ranks: int
    link: Link
    chip: Chip


def add_cluster_flags(parser: Parser) -> None:
    """Add the flags of `--dry-run` for several machines."""
    group = parser.add_argument_group("several machines, with --dry-run")
    parser.hide(
        group.add_argument(
            "--ranks", type=int, metavar="N", help="also estimate a step on N equal machines"
        ),
        group.add_argument(
            "--link",
            metavar="LINK",
            help="network between them: thunderbolt5 (default), 10gbe, wifi, or a measurement of "
            "`bench link`",
        ),
        group.add_argument(
            "--chip",
            metavar="CHIP",
            help="their chip: m1, m2, m3, m4, m4-pro, m4-max (default), m1-max, m1-ultra, or a "
            "measurement of `bench link`",
        ),
    )


def read_cluster(args: argparse.Namespace) -> Cluster | None:
    """The cluster that the flags mean, if any. Raises UsageError."""
    if (args.ranks, args.link, args.chip) == (None, None, None):
        return None
    if not args.dry_run:
        raise UsageError(
            "--ranks, --link and --chip are for --dry-run.",
            "To run on several machines: mlx.launch --hostfile FILE -- python -m mlx_sora ...",
        )
    if args.ranks is None or not 1 <= args.ranks <= MAX_RANKS:
        raise UsageError(
            f"--ranks {args.ranks} is no number of machines.", f"Give 1 to {MAX_RANKS}."
        )
    from mlx_sora.distributed.cost_model import read_chip, read_link

    return Cluster(
        args.ranks, read_link(args.link or "thunderbolt5"), read_chip(args.chip or "m4-max")
    )


def show_forecasts(
    pipeline: Pipeline, requests: Iterable[GenerationRequest], cluster: Cluster, as_json: bool
) -> None:
    """The forecast of each request, on stdout."""
    for request in requests:
        alone, ways, per_step = foretold(pipeline, request, cluster)
        if as_json:
            rows = [record(way, per_step) for way in (alone, *ways)]
            print(json.dumps({"chip": cluster.chip.name, "link": cluster.link.name, "ways": rows}))
        else:
            print("\n".join(forecast_table(cluster, alone, ways, per_step)))


def foretold(
    pipeline: Pipeline, request: GenerationRequest, cluster: Cluster
) -> tuple[StepEstimate, list[StepEstimate], int]:
    """An evaluation on one machine, on the cluster in every way, and evaluations of a step."""
    import mlx.core as mx

    from mlx_sora.distributed.cost_model import estimate_step
    from mlx_sora.loading.quantization import choose_quantization
    from mlx_sora.loading.sizes import model_sizes

    run = pipeline.prepare(request)
    model = choose_quantization(pipeline.model, run.request.quantize)
    sizes = model_sizes(model, mx.bfloat16)
    (alone,) = estimate_step(sizes, run.workload, cluster.chip, cluster.link, 1)
    ways = estimate_step(sizes, run.workload, cluster.chip, cluster.link, cluster.ranks)
    return alone, ways, run.workload.evaluations // run.settings.steps


def forecast_table(
    cluster: Cluster, alone: StepEstimate, ways: Iterable[StepEstimate], per_step: int
) -> Iterator[str]:
    """Lines that show what a step would take."""
    yield (
        f"foretold, not measured: {cluster.chip.name}, {cluster.link.name}, one step without "
        "accelerations"
    )
    yield f"{'ranks':<7}{'parallel':<10}{'s/step':>9}{'speed':>8}{'exchange':>10}{'sent':>11}"
    for way in (alone, *(way for way in ways if way.division.ranks > 1)):
        yield (
            f"{way.division.ranks:<7}{way.division.mode:<10}{way.seconds * per_step:>9.3g}"
            f"{alone.seconds / way.seconds:>7.2f}x{way.share:>10.0%}"
            f"{way.sent * per_step / 1e6:>8.1f} MB"
        )


def record(way: StepEstimate, per_step: int) -> dict[str, Any]:
    """A way as plain JSON values."""
    return {
        "ranks": way.division.ranks,
        "parallel": way.division.mode,
        "seconds_per_step": way.seconds * per_step,
        "share_of_exchange": way.share,
        "bytes_sent_per_step": way.sent * per_step,
    }
