"""`bench link`: measure the machines of a cluster and the link between them."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from mlx_sora.cli.flags import add_debug_flag
from mlx_sora.distributed.group import Ranks, init_ranks
from mlx_sora.errors import UsageError

#: Bytes of the gather that measures bandwidth, about those between two blocks at 240p.
LARGE = 16 << 20

#: Latent grid (T, H, W), pixels and text tokens of the timed block pair: 17 frames of 240p.
GRID, HEIGHT, WIDTH, TOKENS = (5, 30, 53), 240, 426, 60


def add_parser(benches: Any) -> None:
    """Register the bench."""
    parser = benches.add_parser(
        "link",
        help="measure several machines and the link between them",
        description="Start it on all machines: mlx.launch --hostfile FILE -- python -m mlx_sora "
        "bench link. It times gathers between them and a block pair on each, and prints the flags "
        "with which `generate --dry-run` estimates other requests and clusters.",
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=5,
        metavar="N",
        help="timed runs, of which the median counts; default: 5",
    )
    add_debug_flag(parser)
    parser.set_defaults(run=run, parallel_run=True)


def run(args: argparse.Namespace) -> int:
    """Measure on all ranks; print on rank 0."""
    from mlx_sora.runtime.device import default_dtype

    if args.runs < 1:
        raise UsageError(f"--runs must be at least 1, got {args.runs}.", "Give 1 or more.")
    ranks = init_ranks()
    if ranks.size == 1:
        raise UsageError(
            "bench link needs at least two ranks.",
            "Run: mlx.launch -n 2 -- python -m mlx_sora bench link (or with --hostfile FILE).",
        )
    latency = _gather_seconds(ranks, 1, 20 * args.runs) / (ranks.size - 1)
    bandwidth = (ranks.size - 1) * LARGE / _gather_seconds(ranks, LARGE // 4, args.runs)
    slowest = min(ranks.all_gather_object(_block_flops(default_dtype(), args.runs)))
    if ranks.is_rank0:
        print(f"{ranks.size} ranks; a gather of {LARGE >> 20} MiB from each, and a block pair")
        print(
            f"--ranks {ranks.size} --link {bandwidth / 1e9:.3f}GB/s,{latency * 1e3:.3f}ms "
            f"--chip {slowest / 1e12:.3f}TFLOPS"
        )
    return 0


def _gather_seconds(ranks: Ranks, numbers: int, runs: int) -> float:
    """Return the median seconds of an all-gather of so many float32 from each rank."""
    import mlx.core as mx

    own = mx.full((numbers,), float(ranks.rank))
    mx.eval(own)
    return _median(lambda: mx.eval(ranks.all_gather(own)), runs)


def _block_flops(dtype: Any, runs: int) -> float:
    """Return operations per second in a block pair of the published width."""
    import mlx.core as mx

    from mlx_sora.memory.flops import Grid, transformer_flops
    from mlx_sora.models.stdit3 import STDiT3, STDiT3Config

    config = STDiT3Config(depth=1)
    network = STDiT3(config, dtype)
    network.set_dtype(dtype)
    text = [mx.zeros((TOKENS, config.caption_channels), dtype)]
    conditions = network.prepare(text, GRID, height=HEIGHT, width=WIDTH, fps=24.0)
    z = mx.random.normal((1, *GRID, config.in_channels), key=mx.random.key(0))
    t = mx.full((1,), 500.0)
    seconds = _median(lambda: mx.eval(network(z, t, conditions)), runs)
    return transformer_flops(config, Grid.from_latent(config, GRID, 1, TOKENS)) / seconds


def _median(work: Callable[[], object], runs: int) -> float:
    """Return the median seconds of `work`, after one run to warm up."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
