"""Estimated time of a run, and sizes of the published model.

On a machine that `doctor --machine` measured, the time follows from its speeds; on other devices,
from published figures. `python -m mlx_sora bench memory` measures whole runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_sora.memory.plan import (
    FLOAT32_SIZE,
    Machine,
    ModelSizes,
    Plan,
    VAESizes,
    WeightSizes,
    Workload,
)
from mlx_sora.memory.planner import make_plan
from mlx_sora.memory.profiles import PROFILES
from mlx_sora.memory.requirements import stage_requirements
from mlx_sora.memory.speeds import MachineSpeeds
from mlx_sora.memory.stages import BlockStageMemory, StageMemory
from mlx_sora.models.precision import Precision, dtype_name
from mlx_sora.models.stdit3 import STDiT3, STDiT3Config
from mlx_sora.models.t5 import T5Config, T5Encoder
from mlx_sora.models.vae import VAEConfig, VideoVAE, chunk_plan


@dataclass(frozen=True)
class Efficiency:
    """Assumed fraction of each published figure that a run reaches."""

    flops: float
    bandwidth: float
    disk: float


#: flops: an M4 reaches 0.7 in one large product (2.9 TFLOPS, arXiv 2502.05317).
ASSUMED_EFFICIENCY = Efficiency(flops=0.5, bandwidth=0.8, disk=0.8)

#: On-device Sora's denoising: 22 TFLOP in 35.4 s (arXiv 2502.04363, table 1).
_IPHONE_EFFICIENCY = Efficiency(flops=0.3, bandwidth=0.8, disk=0.8)


@dataclass(frozen=True)
class Device:
    """A device that people have.

    profile: name in `PROFILES`.
    flops, bandwidth, disk: GPU operations, bytes of memory and bytes of the disk, per second.
    efficiency: measured where someone has, else assumed.
    """

    name: str
    profile: str
    flops: float
    bandwidth: float
    disk: float
    efficiency: Efficiency = ASSUMED_EFFICIENCY

    @property
    def chip(self) -> str:
        """Name of the chip, such as M4 Pro."""
        return self.name.rpartition(", ")[2]

    @property
    def budget(self) -> int:
        """Bytes that one application may use."""
        return PROFILES[self.profile]


#: Operations per second of a GPU core per hertz: 128 lanes, a multiplication and an addition each.
_PER_CORE = 2 * 128

#: flops: M1 to M2 as Apple announced them (2.6, 10.4, 21 and 3.6 TFLOPS; apple.com/newsroom of
#: November 2020, October 2021, March and June 2022), A17 Pro from arXiv 2502.04363, later chips as
#: cores times clock (1.40 GHz M2 Ultra and M3, 1.58 GHz M4 and M5; M5's as measured by
#: powermetrics, r/hardware, "Apple M5 GPU Roofline Analysis"). The neural accelerators in M5's GPU
#: cores do not count: Apple announced four times M4's peak for AI with them, in half precision
#: (apple.com/newsroom of October 2025 and March 2026). bandwidth: Apple's technical specifications,
#: A17 Pro's and M1's from the type of their memory. disk: assumed, round figures of reads.
DEVICES = (
    Device("iPhone 15 Pro", "iphone-15-pro", 2.15e12, 51.2e9, 1.5e9, _IPHONE_EFFICIENCY),
    Device("iPad 8 GB, M2", "ipad-8gb", 3.6e12, 100e9, 1.5e9),
    Device("iPad 16 GB, M4", "ipad-16gb", 10 * _PER_CORE * 1.58e9, 120e9, 2.5e9),
    Device("Mac 8 GB, M1", "mac-8gb", 2.6e12, 68e9, 2.5e9),
    Device("Mac 8 GB, M3", "mac-8gb", 10 * _PER_CORE * 1.40e9, 100e9, 2.5e9),
    Device("Mac 16 GB, M2", "mac-16gb", 3.6e12, 100e9, 2.5e9),
    Device("Mac 16 GB, M4", "mac-16gb", 10 * _PER_CORE * 1.58e9, 120e9, 2.5e9),
    Device("Mac 16 GB, M5", "mac-16gb", 10 * _PER_CORE * 1.58e9, 153e9, 5e9),
    Device("Mac 24 GB, M4 Pro", "mac-24gb", 20 * _PER_CORE * 1.58e9, 273e9, 5e9),
    Device("Mac 24 GB, M5 Pro", "mac-24gb", 20 * _PER_CORE * 1.58e9, 307e9, 5e9),
    Device("Mac 32 GB, M1 Max", "mac-32gb", 10.4e12, 400e9, 5e9),
    Device("Mac 64 GB, M1 Ultra", "mac-64gb", 21e12, 800e9, 5e9),
    Device("Mac 64 GB, M4 Max", "mac-64gb", 40 * _PER_CORE * 1.58e9, 546e9, 5e9),
    Device("Mac 128 GB, M5 Max", "mac-128gb", 40 * _PER_CORE * 1.58e9, 614e9, 5e9),
    Device("Mac 192 GB, M2 Ultra", "mac-192gb", 76 * _PER_CORE * 1.40e9, 800e9, 5e9),
    Device("Mac 512 GB, M3 Ultra", "mac-512gb", 80 * _PER_CORE * 1.40e9, 819e9, 5e9),
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of each stage, and the plan they follow from. second_pass: seconds of it, if any."""

    seconds: dict[str, float]
    plan: Plan
    second_pass: float | None = None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def after(self, first: Estimate) -> Estimate:
        """Return the estimate of both passes, of which this one is the second; text counts once."""
        seconds = dict(self.seconds)
        for stage, value in first.seconds.items():
            if stage != "encode":
                seconds[stage] = seconds.get(stage, 0.0) + value
        second = self.total - self.seconds.get("encode", 0.0)
        return replace(self, seconds=seconds, second_pass=second)


def estimate(
    sizes: ModelSizes,
    workload: Workload,
    device: Device,
    itemsize: int,
    efficiency: Efficiency | None = None,
) -> Estimate:
    """Estimate the seconds of `workload` on `device`, within the memory of its profile.

    A stage takes as long as the slowest of computing, moving bytes through memory and reading the
    disk if it prefetches blocks; else the time of reading is added. Start-up does not count.
    itemsize: bytes per weight in memory. efficiency: in place of the device's own. Raises
    MemoryBudgetError if the run does not fit.
    """
    efficiency = efficiency or device.efficiency
    machine = Machine(gpu=True, cache_limit=device.budget, itemsize=itemsize)
    plan = make_plan(sizes, workload, machine, device.budget)
    requirements = stage_requirements(sizes, workload, machine, throttled=False)
    seconds = {}
    for stage, memory in zip(plan.stages, requirements, strict=True):
        moving = bytes_touched(memory, sizes, workload) / (device.bandwidth * efficiency.bandwidth)
        computing = max(stage.flops / (device.flops * efficiency.flops), moving)
        reading = stage.read / (device.disk * efficiency.disk)
        seconds[stage.stage] = max(computing, reading) if stage.prefetch else computing + reading
    return Estimate(seconds, plan)


#: Network that does the work of a stage.
_NETWORKS = {"encode": "text_encoder", "read": "vae", "denoise": "transformer", "decode": "vae"}


def estimate_from_speeds(
    sizes: ModelSizes,
    workload: Workload,
    plan: Plan,
    speeds: MachineSpeeds,
    precision: Precision,
    texts: int = 1,
) -> Estimate:
    """Estimate the seconds of a planned run on the machine that has these speeds.

    texts: number of texts to encode. Start-up does not count, nor do other ranks.
    """
    passes = {"encode": texts, "denoise": workload.clips * workload.block_passes}
    weights = {"encode": sizes.text_weights.total, "denoise": sizes.transformer_weights.total}
    seconds = {}
    for stage in plan.stages:
        name = stage.stage
        count = passes.get(name, 0)
        network = _NETWORKS[name]
        speed = speeds.network(network, dtype_name(getattr(precision, network)))
        flops = stage.flops * (texts if name == "encode" else 1)
        computing = speed.seconds(flops, count * weights.get(name, 0))
        computing += count * stage.blocks * _BLOCKS_PER_UNIT.get(name, 1) * speeds.latency
        reading = stage.read / speeds.disk
        seconds[name] = max(computing, reading) if stage.prefetch else computing + reading
    return Estimate(seconds, plan)


#: Blocks of a network in what the plan calls a block: STDiT3 has a spatial and a temporal one.
_BLOCKS_PER_UNIT = {"denoise": 2}


def bytes_touched(stage: StageMemory, sizes: ModelSizes, workload: Workload) -> int:
    """Return the bytes that a stage moves through memory: weights, and activations of each block.

    Each pass reads all weights; it is assumed to write and read a block's activations once.
    """
    if isinstance(stage, BlockStageMemory):
        activations = 2 * stage.activations * len(stage.weights.blocks)
        return stage.passes * (stage.weights.total + activations)
    config, num_frames = sizes.vae, workload.geometry.num_frames
    frames = max(stage.spatial_activations)
    chunks = chunk_plan(num_frames, config.micro_frame_size, config.temporal.factor)
    batches = sum(-(-chunk.frames // frames) for chunk in chunks)
    # As if every level were as large as the last, which overestimates by far.
    temporal = 2 * stage.temporal_activations * len(config.temporal.widths)
    spatial = 2 * stage.spatial_activations[frames] * len(config.spatial.block_out_channels)
    return len(chunks) * (stage.weights.temporal + temporal) + batches * (
        stage.weights.spatial + spatial
    )


def published_sizes(itemsize: int) -> ModelSizes:
    """Return the sizes of Open-Sora 1.2 with `itemsize` bytes per weight; its VAE is float32.

    Builds the networks, allocates nothing.
    """
    text, transformer, vae = T5Config(), STDiT3Config(), VAEConfig()
    encoder, denoiser = T5Encoder(text, embedding=False), STDiT3(transformer, mx.float32)
    decoder = VideoVAE(vae, ("decoder",))
    pairs = zip(denoiser.spatial_blocks, denoiser.temporal_blocks, strict=True)
    return ModelSizes(
        text=text,
        transformer=transformer,
        vae=vae,
        text_weights=_weights(encoder, [_count(b) for b in encoder.encoder.block], itemsize),
        transformer_weights=_weights(denoiser, [_count(a) + _count(b) for a, b in pairs], itemsize),
        vae_decoder=vae_sizes(decoder),
    )


def vae_sizes(vae: VideoVAE) -> VAESizes:
    """Return the sizes of the networks of `vae`, as if they were stored in float32."""
    temporal, layers = vae.temporal_vae, None
    if "decoder" in temporal:
        blocks = [_count(layer) for layer in temporal.decoder.layers().values()]
        kernel = FLOAT32_SIZE * max(map(prod, _shapes(temporal.decoder)))
        layers = _weights(temporal, blocks, FLOAT32_SIZE)
        # Kernels are transposed when they are read.
        layers = replace(layers, load_peak_bytes=max(layers.blocks) + kernel)
    spatial, stored = (FLOAT32_SIZE * _count(network) for network in (vae.spatial_vae, vae))
    return VAESizes(FLOAT32_SIZE * _count(temporal), spatial, stored, layers)


def _weights(network: nn.Module, blocks: list[int], itemsize: int) -> WeightSizes:
    rest = itemsize * (_count(network) - sum(blocks))
    sizes = tuple(itemsize * count for count in blocks)
    return WeightSizes(
        sizes, load_peak_bytes=max(sizes), rest=rest, stored_blocks=sum(sizes), stored_rest=rest
    )


def _count(network: nn.Module) -> int:
    return sum(map(prod, _shapes(network)))


def _shapes(network: nn.Module) -> list[tuple[int, ...]]:
    leaves: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
    return [value.shape for _, value in leaves]
