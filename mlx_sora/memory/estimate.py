"""How long a run would take on machines that nobody measured: published figures and arithmetic.

These are estimates. `python -m mlx_sora bench memory` measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_sora.memory.plan import FLOAT, Machine, ModelSizes, Plan, WeightSizes, Workload
from mlx_sora.memory.planner import make_plan
from mlx_sora.memory.profiles import PROFILES
from mlx_sora.memory.requirements import BlockStageMemory, VaeStageMemory, stage_requirements
from mlx_sora.models.stdit3 import STDiT3, STDiT3Config
from mlx_sora.models.t5 import T5Config, T5Encoder
from mlx_sora.models.vae import VAEConfig, VideoVAE, chunk_plan


@dataclass(frozen=True)
class Efficiency:
    """Share of each published figure that a run is assumed to reach."""

    flops: float
    bandwidth: float
    disk: float


#: The one place where this is assumed. flops: an M4 reaches 0.7 in one large product (2.9 TFLOPS,
#: arXiv 2502.05317); On-device Sora 0.3 on an iPhone (22 TFLOP in 35.4 s, arXiv 2502.04363).
ASSUMED = Efficiency(flops=0.5, bandwidth=0.8, disk=0.8)


@dataclass(frozen=True)
class Device:
    """A class of machines. profile: of `PROFILES`, what one application may use; flops, bandwidth
    and disk: operations of the GPU, bytes of memory and of the disk, each per second.
    """

    name: str
    profile: str
    flops: float
    bandwidth: float
    disk: float

    @property
    def budget(self) -> int:
        """Bytes that one application may use."""
        return PROFILES[self.profile]


#: Operations per second of a GPU core per hertz: 128 lanes, a multiplication and an addition each.
_PER_CORE = 2 * 128

#: flops: M1 to M2 as Apple announced them (2.6, 10.4, 21 and 3.6 TFLOPS; apple.com/newsroom of
#: November 2020, October 2021, March and June 2022), A17 Pro from arXiv 2502.04363, later chips as
#: cores times clock (1.40 GHz M3, 1.58 GHz M4). bandwidth: Apple's technical specifications, A17
#: Pro's and M1's from the type of their memory. disk: round figures for reading in one go, assumed.
DEVICES = (
    Device("iPhone 15 Pro", "iphone-15-pro", 2.15e12, 51.2e9, 1.5e9),
    Device("iPad 8 GB, M2", "ipad-8gb", 3.6e12, 100e9, 1.5e9),
    Device("iPad 16 GB, M4", "ipad-16gb", 10 * _PER_CORE * 1.58e9, 120e9, 2.5e9),
    Device("Mac 8 GB, M1", "mac-8gb", 2.6e12, 68e9, 2.5e9),
    Device("Mac 8 GB, M3", "mac-8gb", 10 * _PER_CORE * 1.40e9, 100e9, 2.5e9),
    Device("Mac 16 GB, M2", "mac-16gb", 3.6e12, 100e9, 2.5e9),
    Device("Mac 16 GB, M4", "mac-16gb", 10 * _PER_CORE * 1.58e9, 120e9, 2.5e9),
    Device("Mac 24 GB, M4 Pro", "mac-24gb", 20 * _PER_CORE * 1.58e9, 273e9, 5e9),
    Device("Mac 32 GB, M1 Max", "mac-32gb", 10.4e12, 400e9, 5e9),
    Device("Mac 64 GB, M1 Ultra", "mac-64gb", 21e12, 800e9, 5e9),
    Device("Mac 64 GB, M4 Max", "mac-64gb", 40 * _PER_CORE * 1.58e9, 546e9, 5e9),
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of each stage, and the plan they follow from."""

    seconds: dict[str, float]
    plan: Plan

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def estimate(
    model: ModelSizes,
    job: Workload,
    device: Device,
    itemsize: int,
    efficiency: Efficiency = ASSUMED,
) -> Estimate:
    """What `job` takes on `device`, weights of `itemsize` bytes in memory, within its profile.

    A stage takes as long as the slowest of computing, moving bytes through memory and reading the
    disk, where blocks are read ahead; else reading comes on top. Starting up is left out.
    Raises MemoryBudgetError where it does not fit.
    """
    machine = Machine(gpu=True, cache=device.budget, itemsize=itemsize)
    plan = make_plan(model, job, machine, device.budget)
    seconds = {}
    for stage, need in zip(
        plan.stages, stage_requirements(model, job, machine, throttled=False), strict=True
    ):
        moving = bytes_touched(need, model, job) / (device.bandwidth * efficiency.bandwidth)
        working = max(stage.flops / (device.flops * efficiency.flops), moving)
        reading = stage.read / (device.disk * efficiency.disk)
        seconds[stage.stage] = max(working, reading) if stage.prefetch else working + reading
    return Estimate(seconds, plan)


def bytes_touched(need: BlockStageMemory | VaeStageMemory, model: ModelSizes, job: Workload) -> int:
    """Bytes that a stage moves through memory: its weights and the activations of every block.

    Each pass reads all weights; activations of a block are taken to be written and read once.
    """
    if isinstance(need, BlockStageMemory):
        return need.passes * (need.weights.total + 2 * need.work * len(need.weights.blocks))
    config = model.vae
    frames = max(need.spatial)
    chunks = chunk_plan(job.geometry.num_frames, config.micro_frame_size, config.temporal.factor)
    batches = sum(-(-chunk.frames // frames) for chunk in chunks)
    temporal, spatial = need.weights
    levels = len(config.spatial.block_out_channels), len(config.temporal.widths)
    # As if every level were as large as the last one, which it is not by far.
    return len(chunks) * (temporal + 2 * need.temporal * levels[1]) + batches * (
        spatial + 2 * need.spatial[frames] * levels[0]
    )


def shape_sizes(
    itemsize: int,
    text: T5Config | None = None,
    transformer: STDiT3Config | None = None,
    vae: VAEConfig | None = None,
) -> ModelSizes:
    """A model whose weights take `itemsize` bytes in memory and on disk, its VAE float32's.

    Configurations left out are Open-Sora 1.2's. Builds the networks, allocates nothing.
    """
    text, transformer = text or T5Config(), transformer or STDiT3Config.xl_2()
    vae = vae or VAEConfig()
    encoder, denoiser = T5Encoder(text, embedding=False), STDiT3(transformer, mx.float32)
    decoder = VideoVAE(vae, ("decoder",))
    pairs = zip(denoiser.spatial_blocks, denoiser.temporal_blocks, strict=True)
    temporal, spatial = (
        FLOAT * _count(part) for part in (decoder.temporal_vae, decoder.spatial_vae)
    )
    return ModelSizes(
        text=text,
        transformer=transformer,
        vae=vae,
        text_weights=_weights(encoder, [_count(b) for b in encoder.encoder.block], itemsize),
        transformer_weights=_weights(denoiser, [_count(a) + _count(b) for a, b in pairs], itemsize),
        temporal=temporal,
        spatial=spatial,
        vae_stored=FLOAT * _count(decoder),
    )


def _weights(network: nn.Module, blocks: list[int], itemsize: int) -> WeightSizes:
    rest = itemsize * (_count(network) - sum(blocks))
    sizes = tuple(itemsize * count for count in blocks)
    return WeightSizes(
        sizes, loading=max(sizes), rest=rest, stored_blocks=sum(sizes), stored_rest=rest
    )


def _count(network: nn.Module) -> int:
    """Values of all parameters."""
    leaves: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
    return sum(prod(value.shape) for _, value in leaves)
