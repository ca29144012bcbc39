"""Estimates of a step on several equal machines: arithmetic, not measurement.

A step takes as long as the largest shard of its work plus the exchanges, one after the other:

    seconds = work / ranks (more if shards are uneven) + bytes / bandwidth + messages · latency

`partition.sent_bytes` and `partition.sent_messages` count what each rank sends in a ring.
`mlx_sora bench link` measures real machines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlx_sora.distributed.partition import (
    ParallelPlan,
    choose_parallel,
    sent_bytes,
    sent_messages,
    split_evenly,
)
from mlx_sora.errors import UsageError
from mlx_sora.memory import activations, flops
from mlx_sora.memory.activations import ExecutionMode
from mlx_sora.memory.estimate import DEVICES
from mlx_sora.memory.flops import Grid
from mlx_sora.memory.plan import ModelSizes, Workload


@dataclass(frozen=True)
class Link:
    """Link between two machines. bandwidth: bytes/s one way. latency: seconds to the first byte."""

    name: str
    bandwidth: float
    latency: float


#: thunderbolt5: MLX's ring reaches 48 Gb/s (ml-explore/mlx pull request 1985); a round trip takes
#: 0.38 ms at best, over Wi-Fi 7.5 ms (exo-explore/exo issue 2295). 10gbe: TCP's share of 10 Gb/s,
#: and an assumed round trip of 0.2 ms. wifi: 0.6 Gb/s, assumed.
LINKS = (
    Link("thunderbolt5", 6e9, 0.19e-3),
    Link("10gbe", 1.17e9, 0.1e-3),
    Link("wifi", 75e6, 3.75e-3),
)


@dataclass(frozen=True)
class Chip:
    """Chip of one machine. flops: operations/s. bandwidth: bytes of memory/s."""

    name: str
    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Cluster:
    """Equal machines, one rank each, and the link between them."""

    ranks: int
    chip: Chip
    link: Link


@dataclass(frozen=True)
class StepEstimate:
    """Estimate of a step. sent_bytes: by each rank."""

    parallel_plan: ParallelPlan
    compute_seconds: float
    exchange_seconds: float
    sent_bytes: int

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.exchange_seconds

    @property
    def exchange_share(self) -> float:
        """Fraction of the time that goes into exchanges."""
        return self.exchange_seconds / self.seconds


def chips() -> dict[str, Chip]:
    """Return chips by name, with the assumed share of their published speeds."""
    return {
        device.chip.lower().replace(" ", "-"): Chip(
            device.chip,
            device.flops * device.efficiency.flops,
            device.bandwidth * device.efficiency.bandwidth,
        )
        for device in DEVICES
        if device.name.startswith("Mac")
    }


def parse_chip(text: str) -> Chip:
    """Return a chip by name or by measured speed, such as 1.3TFLOPS (printed by `bench link`)."""
    known = chips()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)TFLOPS", text, re.IGNORECASE)
    if found and float(found[1]) > 0:
        # The measured speed includes the traffic of memory.
        return Chip(text, float(found[1]) * 1e12, float("inf"))
    if text.lower() not in known:
        raise UsageError(
            f"Unknown chip {text[:40]!r}.",
            f"Give one of {', '.join(known)}, or the speed from bench link, such as 1.3TFLOPS.",
        )
    return known[text.lower()]


def parse_link(text: str) -> Link:
    """Return a link by name or as measured, such as 4.8GB/s,0.2ms (printed by `bench link`)."""
    for link in LINKS:
        if text.lower() == link.name:
            return link
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(M|G)B/s,(\d+(?:\.\d+)?)ms", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise UsageError(
            f"Unknown link {text[:40]!r}.",
            f"Give one of {', '.join(link.name for link in LINKS)}, or the figures from bench "
            "link, such as 4.8GB/s,0.2ms.",
        )
    scale = 1e9 if found[2].upper() == "G" else 1e6
    return Link(text, float(found[1]) * scale, float(found[3]) / 1e3)


#: Weights of two bytes, and MLX free to queue operations.
_MODE = ExecutionMode(gpu=True, throttled=False, itemsize=2)


def estimate_step(
    model: ModelSizes, workload: Workload, cluster: Cluster, evaluations: int = 1
) -> list[StepEstimate]:
    """Return estimates of a step, one for each way to split it, fastest first.

    No accelerations. Embedders and the final layer, below 1 %, count as split too; all blocks are
    resident. evaluations: of the network in a step, those of all windows.
    """
    ranks, windows = cluster.ranks, workload.clips if workload.windowed else 1
    modes = ("sequence", "auto") if ranks > 1 else ("auto",)
    plans = dict.fromkeys(choose_parallel(mode, ranks, guided=workload.guided) for mode in modes)
    estimates = [_estimate(model, workload, cluster, plan, evaluations) for plan in plans]
    if 1 < ranks <= windows:
        plan = ParallelPlan(ranks, window_degree=ranks)
        side_by_side = evaluations * -(-windows // ranks) // windows
        estimates.append(_estimate(model, workload, cluster, plan, side_by_side))
    return sorted(estimates, key=lambda estimate: estimate.seconds)


def _estimate(
    model: ModelSizes, workload: Workload, cluster: Cluster, plan: ParallelPlan, evaluations: int
) -> StepEstimate:
    config, chip, link = model.transformer, cluster.chip, cluster.link
    batch = 2 if workload.guided else 1
    grid = Grid.from_latent(config, workload.geometry.latent, batch, workload.text_tokens)
    share = _largest_share(grid, plan)
    activation_bytes = activations.transformer(config, grid, _MODE) * 2 * config.depth
    compute = max(
        share * flops.transformer_flops(config, grid) / chip.flops,
        (model.transformer_weights.total + share * activation_bytes) / chip.bandwidth,
    )
    sent = sent_bytes(config, grid, plan)
    exchange = sent / link.bandwidth + sent_messages(config, grid, plan) * link.latency
    return StepEstimate(plan, compute * evaluations, exchange * evaluations, sent * evaluations)


def _largest_share(grid: Grid, plan: ParallelPlan) -> float:
    """Return the largest fraction of an evaluation that a rank computes."""
    frames = max(map(len, split_evenly(grid.frames, plan.sp_degree))) / grid.frames
    tokens = max(map(len, split_evenly(grid.spatial_tokens, plan.sp_degree))) / grid.spatial_tokens
    # Half of the blocks are split by frames, half by tokens.
    return (frames + tokens) / 2 / plan.cfg_degree
