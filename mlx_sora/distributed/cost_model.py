"""How long a step would take on several equal machines over a link: arithmetic, not measurement.

A step lasts as long as the largest share of its work plus what is exchanged, one after the other:

    seconds = work / ranks (more where shares are uneven) + sent / bandwidth + hops · latency

`sent` and `hops` are what each rank sends in a ring, and how often it does (`parallel.sent_bytes`,
`parallel.hops`). `mlx_sora bench link` measures what a cluster that is at hand reaches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlx_sora.distributed.partition import (
    ParallelPlan,
    choose_parallel,
    hops,
    sent_bytes,
    split_evenly,
)
from mlx_sora.errors import UsageError
from mlx_sora.memory import flops
from mlx_sora.memory.activations import ExecutionMode, transformer_work
from mlx_sora.memory.estimate import ASSUMED, DEVICES
from mlx_sora.memory.flops import Grid
from mlx_sora.memory.plan import ModelSizes, Workload


@dataclass(frozen=True)
class Link:
    """What joins two machines: bytes per second one way, and seconds until the first arrives."""

    name: str
    bandwidth: float
    latency: float


#: thunderbolt5: MLX's ring reaches 48 Gb/s (ml-explore/mlx pull request 1985); a round trip takes
#: 0.38 ms at best, over Wi-Fi 7.5 ms (exo-explore/exo issue 2295). 10gbe: what TCP leaves of
#: 10 Gb/s, and an assumed round trip of 0.2 ms. wifi: 0.6 Gb/s, assumed.
LINKS = (
    Link("thunderbolt5", 6e9, 0.19e-3),
    Link("10gbe", 1.17e9, 0.1e-3),
    Link("wifi", 75e6, 3.75e-3),
)


@dataclass(frozen=True)
class Chip:
    """What one machine reaches: operations and bytes of memory per second."""

    name: str
    flops: float
    bandwidth: float


@dataclass(frozen=True)
class StepEstimate:
    """One way to divide a step. computing, exchanging: seconds; sent: bytes, by each rank."""

    division: ParallelPlan
    computing: float
    exchanging: float
    sent: int

    @property
    def seconds(self) -> float:
        return self.computing + self.exchanging

    @property
    def share(self) -> float:
        """Of the step, what goes into exchanging."""
        return self.exchanging / self.seconds


def chips() -> dict[str, Chip]:
    """Published speeds by chip, of which a share is assumed to be reached."""
    return {
        device.name.rpartition(", ")[2].lower().replace(" ", "-"): Chip(
            device.name.rpartition(", ")[2],
            device.flops * ASSUMED.flops,
            device.bandwidth * ASSUMED.bandwidth,
        )
        for device in DEVICES
        if device.name.startswith("Mac")
    }


def read_chip(text: str) -> Chip:
    """A chip by name, or measured, such as 1.3TFLOPS (as `bench link` prints it)."""
    known = chips()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)TFLOPS", text, re.IGNORECASE)
    if found and float(found[1]) > 0:
        # Measured work includes moving it through memory.
        return Chip(text, float(found[1]) * 1e12, float("inf"))
    if text.lower() not in known:
        raise UsageError(
            f"Unknown chip {text[:40]!r}.",
            f"Give one of {', '.join(known)}, or what bench link measured, such as 1.3TFLOPS.",
        )
    return known[text.lower()]


def read_link(text: str) -> Link:
    """A link by name, or measured, such as 4.8GB/s,0.2ms (as `bench link` prints it)."""
    for link in LINKS:
        if text.lower() == link.name:
            return link
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(M|G)B/s,(\d+(?:\.\d+)?)ms", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise UsageError(
            f"Unknown link {text[:40]!r}.",
            f"Give one of {', '.join(link.name for link in LINKS)}, or what bench link measured, "
            "such as 4.8GB/s,0.2ms.",
        )
    scale = 1e9 if found[2].upper() == "G" else 1e6
    return Link(text, float(found[1]) * scale, float(found[3]) / 1e3)


#: Weights of two bytes, as many operations ahead as MLX likes.
GPU = ExecutionMode(gpu=True, throttled=False, itemsize=2)


def estimate_step(
    model: ModelSizes, job: Workload, chip: Chip, link: Link, ranks: int
) -> list[StepEstimate]:
    """A plain evaluation of `job` divided among `ranks`, in every way, the fastest first.

    Embedders and the final layer, below 1 %, are taken as divided too; all blocks as resident.
    """
    asked = ("sequence", "auto") if ranks > 1 else ("auto",)
    ways = dict.fromkeys(choose_parallel(each, ranks, guided=job.guided) for each in asked)
    found = [_forecast(model, job, chip, link, way) for way in ways]
    return sorted(found, key=lambda forecast: forecast.seconds)


def _forecast(
    model: ModelSizes, job: Workload, chip: Chip, link: Link, division: ParallelPlan
) -> StepEstimate:
    config, batch = model.transformer, 2 if job.guided else 1
    grid = Grid.of(config, job.geometry.latent, batch, job.text_tokens)
    largest = _largest_share(grid, division)
    moved = transformer_work(config, grid, GPU) * 2 * config.depth
    computing = max(
        largest * flops.transformer_flops(config, grid) / chip.flops,
        (model.transformer_weights.total + largest * moved) / chip.bandwidth,
    )
    sent, waits = sent_bytes(config, grid, division), hops(config, grid, division)
    return StepEstimate(division, computing, sent / link.bandwidth + waits * link.latency, sent)


def _largest_share(grid: Grid, division: ParallelPlan) -> float:
    """Of an evaluation, what the rank with most to do has: by frames and by places in turn."""
    frames = max(map(len, split_evenly(grid.frames, division.sp_degree))) / grid.frames
    places = max(map(len, split_evenly(grid.tokens, division.sp_degree))) / grid.tokens
    return (frames + places) / 2 / division.cfg_degree
