"""`bench link`: what the machines of a cluster and the link between them reach."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlx_sora.cli.flags import add_debug_flag
from mlx_sora.errors import UsageError

if TYPE_CHECKING:
    from mlx_sora.distributed.group import Ranks

#: Bytes of a gather that shows the bandwidth, about those between two blocks at 240p.
LARGE = 16 << 20

#: Latent frames, height and width, pixels and text of the pair of blocks that is timed: 240p × 17.
GRID, HEIGHT, WIDTH, TOKENS = (5, 30, 53), 240, 426, 60


def add_parser(benches: Any) -> None:
    """Register the bench."""
    parser = benches.add_parser(
        "link",
        help="what several machines and the link between them reach",
        description="Started on all machines by `mlx.launch --hostfile FILE -- python -m mlx_sora "
        "bench link`: times gathers between them and a pair of blocks on each, and prints the "
        "flags with which `generate --dry-run` foretells longer runs and larger clusters.",
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="default: 5")
    add_debug_flag(parser)
    parser.set_defaults(run=run, parallel_run=True)


def run(args: argparse.Namespace) -> int:
    """Measure; rank 0 prints."""
    from mlx_sora.distributed.group import init_ranks
    from mlx_sora.runtime.device import default_dtype

    if args.runs < 1:
        raise UsageError(f"--runs {args.runs} measures nothing.", "Give 1 or more.")
    ranks = init_ranks()
    if ranks.size == 1:
        raise UsageError(
            "A link has two ends.",
            "Run: mlx.launch -n 2 -- python -m mlx_sora bench link (or with --hostfile FILE).",
        )
    latency = _gather(ranks, 1, 20 * args.runs) / (ranks.size - 1)
    bandwidth = (ranks.size - 1) * LARGE / _gather(ranks, LARGE // 4, args.runs)
    slowest = min(ranks.all_gather_object(_flops(default_dtype(), args.runs)))
    if ranks.is_rank0:
        print(f"{ranks.size} ranks; a gather of {LARGE >> 20} MiB from each, and a pair of blocks")
        print(
            f"--ranks {ranks.size} --link {bandwidth / 1e9:.3f}GB/s,{latency * 1e3:.3f}ms "
            f"--chip {slowest / 1e12:.3f}TFLOPS"
        )
    return 0


def _gather(ranks: Ranks, numbers: int, runs: int) -> float:
    """Seconds of a gather of so many float32 from each rank, median."""
    import mlx.core as mx

    own = mx.full((numbers,), float(ranks.rank))
    mx.eval(own)
    return _median(lambda: mx.eval(ranks.all_gather(own)), runs)


def _flops(dtype: Any, runs: int) -> float:
    """Operations per second of a pair of blocks of the published width."""
    import mlx.core as mx

    from mlx_sora.memory.flops import Grid, transformer_flops
    from mlx_sora.models.stdit3 import STDiT3, STDiT3Config

    config = STDiT3Config(depth=1)
    network = STDiT3(config, dtype)
    network.set_dtype(dtype)
    text = [mx.zeros((TOKENS, config.caption_channels), dtype)]
    conditions = network.prepare(text, GRID, height=HEIGHT, width=WIDTH, fps=24.0)
    z, t = mx.random.normal((1, *GRID, config.in_channels)), mx.full((1,), 500.0)
    seconds = _median(lambda: mx.eval(network(z, t, conditions)), runs)
    return transformer_flops(config, Grid.of(config, GRID, 1, TOKENS)) / seconds


def _median(work: Callable[[], object], runs: int) -> float:
    """Seconds of `work`, once it has warmed up."""
    work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
