"""Commands on several ranks, and `generate --dry-run --ranks N`, which estimates a step on them."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mlx_sora.cli.flags import Parser
from mlx_sora.errors import UsageError
from mlx_sora.request.generation import GenerationRequest, label, options

if TYPE_CHECKING:
    from mlx_sora.distributed.cost_model import Cluster, StepEstimate
    from mlx_sora.distributed.group import Ranks
    from mlx_sora.pipeline.pipeline import Pipeline

#: Limit of --ranks; more is likely a typing error.
MAX_RANKS = 1024


#: Names in messages of what is no `--name`.
_FLAGS = {"video": "VIDEO"}

#: Options that each rank has for itself, and what is none.
_OWN_OPTIONS = {
    *("allow_sleep", "debug", "json_events", "open", "parallel_run", "quiet", "run", "show"),
    "verbose",
}


class Broadcastable(Protocol):
    """A request that rank 0 can send to the others."""

    @property
    def single_process(self) -> bool:
        """True if one rank makes it without the others."""

    def to_dict(self) -> dict[str, Any]:
        """Return all that the other ranks need, as plain JSON values."""

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """Invert `to_dict`."""


T = TypeVar("T", bound=Broadcastable)


def broadcast_request(
    ranks: Ranks, kind: type[T], read: Callable[[], T], args: argparse.Namespace
) -> T:
    """Return `read()` of rank 0, whose files count, on all ranks.

    Raises UsageError if another rank was started with other options.
    """
    if ranks.size == 1:
        return read()
    check_same_options(ranks, args)

    def read_shared() -> T:
        request = read()
        if request.single_process:
            raise UsageError(
                "--parallel off is for a single process.",
                "Start one process, without mlx.launch.",
            )
        return request

    request = ranks.on_rank0(read_shared)
    values = ranks.broadcast_object(None if request is None else request.to_dict())
    return kind.from_dict(values) if request is None else request


def check_same_options(ranks: Ranks, args: argparse.Namespace) -> None:
    """Raise UsageError on all ranks if one was started with other options than rank 0.

    Those of the progress may differ, as rank 0 alone shows it.
    """
    facts = {
        label(name) if name in options() else _FLAGS.get(name, "--" + name.replace("_", "-")): (
            _spelling(value)
        )
        for name, value in vars(args).items()
        if name not in _OWN_OPTIONS and value is not None
    }
    ranks.check_equal(facts)


def _spelling(value: Any) -> str:
    """Return an option's value as it was typed. A home folder may have another path elsewhere."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(_spelling, value))
    text, home = str(value), os.path.expanduser("~")
    return "~" + text.removeprefix(home) if text.startswith(home + os.sep) else text


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
            help="chip to estimate for: m1 to m5, m4-pro, m5-pro, m1-max, m4-max (default), "
            "m5-max, m1-ultra, m2-ultra, m3-ultra, or a measurement of `bench link`",
        ),
    )


def read_cluster(args: argparse.Namespace) -> Cluster | None:
    """Return the cluster that the flags describe, if any. Raises UsageError."""
    if (args.ranks, args.link, args.chip) == (None, None, None):
        return None
    if not args.dry_run:
        name = next(n for n in ("ranks", "link", "chip") if getattr(args, n) is not None)
        raise UsageError(
            f"--{name} is for estimates.",
            "Add --dry-run. To run on several machines, start the command with mlx.launch "
            "--hostfile FILE -- instead.",
        )
    if args.ranks is None and args.link is not None:
        raise UsageError("--link needs --ranks.", "Add the number of machines: --ranks 2.")
    ranks = 1 if args.ranks is None else args.ranks
    if not 1 <= ranks <= MAX_RANKS:
        raise UsageError(f"--ranks {args.ranks} is out of range.", f"Give 1 to {MAX_RANKS}.")
    from mlx_sora.distributed.cost_model import Cluster, parse_chip, parse_link

    chip, link = parse_chip(args.chip or "m4-max"), parse_link(args.link or "thunderbolt5")
    return Cluster(ranks, chip, link)


def show_estimates(
    pipeline: Pipeline, requests: Iterable[GenerationRequest], cluster: Cluster, as_json: bool
) -> None:
    """Print the estimates of a step of each request."""
    for request in requests:
        estimates = estimate_on_cluster(pipeline, request, cluster)
        if as_json:
            ways = list(map(_to_dict, estimates))
            print(json.dumps({"chip": cluster.chip.name, "link": cluster.link.name, "ways": ways}))
        else:
            print("\n".join(_table(cluster, estimates)))


def estimate_on_cluster(
    pipeline: Pipeline, request: GenerationRequest, cluster: Cluster
) -> list[StepEstimate]:
    """Return estimates of a step: on one machine, then on the cluster, the fastest first."""
    import mlx.core as mx

    from mlx_sora.distributed.cost_model import estimate_step
    from mlx_sora.loading.quantization_choice import choose_quantization
    from mlx_sora.loading.sizes import model_sizes
    from mlx_sora.models.precision import Precision
    from mlx_sora.sampling import SAMPLERS

    run = pipeline.prepare(request)
    half = Precision(mx.bfloat16, mx.bfloat16)
    sizes = model_sizes(choose_quantization(pipeline.model, run.request.quantize), half)
    evaluations = SAMPLERS[run.settings.sampler].evaluations
    evaluations *= run.workload.clips if run.workload.windowed else 1
    return [
        estimate
        for machines in (replace(cluster, ranks=1), cluster)
        for estimate in estimate_step(sizes, run.workload, machines, evaluations)
    ]


def _table(cluster: Cluster, estimates: Sequence[StepEstimate]) -> Iterator[str]:
    single, *others = estimates
    yield (
        f"estimated, not measured: {cluster.chip.name}, {cluster.link.name}, one step without "
        "accelerations"
    )
    yield f"{'ranks':<7}{'parallel':<10}{'s/step':>9}{'speed':>8}{'exchange':>10}{'sent':>11}"
    for each in (single, *(other for other in others if other.parallel_plan.ranks > 1)):
        yield (
            f"{each.parallel_plan.ranks:<7}{each.parallel_plan.mode:<10}{each.seconds:>9.3g}"
            f"{single.seconds / each.seconds:>7.2f}x{each.exchange_share:>10.0%}"
            f"{each.sent_bytes / 1e6:>8.1f} MB"
        )


def _to_dict(estimate: StepEstimate) -> dict[str, Any]:
    return {
        "ranks": estimate.parallel_plan.ranks,
        "parallel": estimate.parallel_plan.mode,
        "seconds_per_step": estimate.seconds,
        "share_of_exchange": estimate.exchange_share,
        "bytes_sent_per_step": estimate.sent_bytes,
    }
