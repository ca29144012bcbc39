"""Measuring a machine: products, memory, disk, and parts of Open-Sora 1.2 with random weights.

Nothing is downloaded. Each part is as large as this machine computes in a few seconds, up to its
published size at 240p, 51 frames, so that all of it takes about a minute anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_sora.manage.disk_speed import disk_speed
from mlx_sora.manage.machine_file import machine_identity
from mlx_sora.memory import flops
from mlx_sora.memory.limits import memory_scope, release
from mlx_sora.memory.speeds import MachineSpeeds, NetworkSpeed
from mlx_sora.models.ops import on_gpu
from mlx_sora.models.precision import dtype_name
from mlx_sora.models.stdit3 import STDiT3, STDiT3Config
from mlx_sora.models.t5 import T5Block, T5Config
from mlx_sora.models.vae import VAEConfig, VideoVAE

Size = TypeVar("Size")
Module = TypeVar("Module", bound=nn.Module)

#: Gets the name of what is measured now.
OnProgress = Callable[[str], None]

#: Seconds after which a measurement is not repeated, and the most repetitions.
SECONDS, REPEATS = 5.0, 4

#: Share of a large product's speed that parts of networks are assumed to reach, for their size.
_SHARE = 0.8

#: Side of the large product, and bytes of the array that is copied.
_SIDE, _COPY = 2048, 1 << 28

#: Pixels of the 240p video whose parts are measured, and tokens of its prompt.
_HEIGHT, _WIDTH, _TEXT = 240, 426, 60

#: Latent frames, and latent sizes (height, width), that are tried: 240p × 51 first.
_FRAMES = (15, 10, 5, 2, 1)
_PICTURES = ((30, 53), (18, 32), (12, 20), (8, 12), (4, 6))

#: Latent frames and frames of a chunk of the VAE.
_CHUNK = 5, 17

#: Largest share of a large work's time that may not depend on its size.
_MOST_REST = 0.8

#: Prompt lengths, between which the time of T5 is a line.
_LENGTHS = (16, 128)


def measure_speeds(on_progress: OnProgress = lambda _: None) -> MachineSpeeds:
    """Measure this machine with random weights, for about a minute. Downloads nothing.

    Raises MlxSoraError if the test file for the disk cannot be written.
    """
    return SpeedTest().run(on_progress)


@dataclass(frozen=True)
class SpeedTest:
    """Measurement of a machine with networks of these configurations, those of Open-Sora 1.2.

    clock: returns seconds.
    """

    text: T5Config = field(default_factory=T5Config)
    transformer: STDiT3Config = field(default_factory=STDiT3Config)
    vae: VAEConfig = field(default_factory=VAEConfig)
    clock: Callable[[], float] = time.perf_counter

    def run(self, on_progress: OnProgress) -> MachineSpeeds:
        """Measure everything. Raises MlxSoraError if the disk cannot be written to."""
        # CPUs compute in float32: half precision is far slower there.
        types = (mx.float32, mx.bfloat16, mx.float16) if on_gpu() else (mx.float32,)
        networks: dict[str, dict[str, NetworkSpeed]] = {}
        measures = {
            "text_encoder": self._text_encoder,
            "transformer": self._transformer,
            "vae": self._vae,
        }
        with memory_scope():
            on_progress("matrix products")
            products = {dtype_name(dtype): self._product(dtype) for dtype in types}
            on_progress("memory")
            bandwidth = self._copy()
            on_progress("disk")
            disk = disk_speed(self.clock)
            latency = self._latency()
            for name, measure in measures.items():
                networks[name] = {}
                for dtype in types:
                    if (name, dtype) != ("text_encoder", mx.float16):  # in which T5 overflows
                        type_name = dtype_name(dtype)
                        on_progress(f"{name.replace('_', ' ')}, {type_name}")
                        networks[name][type_name] = measure(dtype, products[type_name])
                        release()
        return MachineSpeeds(machine_identity(), products, bandwidth, disk, latency, networks)

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the seconds of the fastest run of a work that returns arrays.

        Short works are repeated: the first run compiles kernels, and others use the machine too.
        """
        times: list[float] = []
        while len(times) < REPEATS and sum(times) < SECONDS:
            mx.synchronize()
            start = self.clock()
            mx.eval(work())
            mx.synchronize()
            times.append(self.clock() - start)
        return min(times)

    def _product(self, dtype: mx.Dtype) -> float:
        x = _normal(_SIDE, _SIDE).astype(dtype)
        mx.eval(x)
        return 2 * _SIDE**3 / self.seconds(lambda: x @ x)

    def _copy(self) -> float:
        x = mx.ones(_COPY // 4)
        mx.eval(x)
        return 2 * _COPY / self.seconds(lambda: x + 1)

    def _latency(self) -> float:
        """Return the seconds of a block without work to speak of."""
        config = STDiT3Config(hidden_size=64, num_heads=2, caption_channels=64, depth=8)
        run = _transformer_pass(_random(STDiT3(config)), (1, 2, 2), 1)
        return self.seconds(run) / (2 * config.depth)

    def _text_encoder(self, dtype: mx.Dtype, speed: float) -> NetworkSpeed:
        """Measure a block of T5 on a short and on a long prompt."""
        config = replace(self.text, num_layers=1)
        block = _random(T5Block(config, has_bias=True), dtype)
        work, times = [], []
        for tokens in _LENGTHS:
            x, bias = _normal(1, tokens, config.d_model).astype(dtype), block.position_bias(tokens)
            mx.eval(x, bias)
            work.append(flops.text_encoder_flops(config, tokens))
            times.append(self.seconds(partial(block, x, bias)))
        return _fit(work, times, block, speed)

    def _transformer(self, dtype: mx.Dtype, speed: float) -> NetworkSpeed:
        """Measure a block pair on a small picture, and guided on as many frames as affordable."""
        config = replace(self.transformer, depth=1)
        network = _random(STDiT3(config, dtype), dtype)

        def work(latent: Sequence[int], batch: int) -> int:
            grid = flops.Grid.from_latent(config, latent, batch, _TEXT)
            return flops.transformer_flops(config, grid)

        videos = [(frames, *_PICTURES[0]) for frames in _FRAMES]
        video = largest_affordable(videos, lambda latent: work(latent, 2), speed)
        grids = (((1, *_PICTURES[2]), 1), (video, 2))
        times = [self.seconds(_transformer_pass(network, *grid)) for grid in grids]
        return _fit([work(*grid) for grid in grids], times, network, speed)

    def _vae(self, dtype: mx.Dtype, speed: float) -> NetworkSpeed:
        """Measure both decoders on as large pictures as affordable, mixed as in a chunk."""
        config, (latents, frames) = self.vae, _CHUNK
        vae = _random(VideoVAE(config, ("decoder",)), dtype)

        def temporal(size: Sequence[int]) -> int:
            return flops.temporal_decoder_flops(config.temporal, latents, *size)

        def spatial(size: Sequence[int]) -> int:
            return flops.spatial_decoder_flops(config.spatial, *size)

        small = largest_affordable(_PICTURES, temporal, speed)
        z = _normal(1, latents, *small, config.temporal.embed_dim).astype(dtype)
        picture = largest_affordable(_PICTURES, spatial, speed)
        x = _normal(1, *picture, config.spatial.latent_channels).astype(dtype)
        mx.eval(x, z)
        pace = self.seconds(lambda: vae.temporal_vae.decode(z, frames)) / temporal(small)
        picture_pace = self.seconds(lambda: vae.spatial_vae.decode(x)) / spatial(picture)
        work, picture_work = temporal(_PICTURES[0]), frames * spatial(_PICTURES[0])
        return NetworkSpeed((work + picture_work) / (work * pace + picture_work * picture_pace))


def largest_affordable(sizes: Sequence[Size], work: Callable[[Size], float], speed: float) -> Size:
    """Return the first of `sizes` whose work takes about SECONDS at most, else the last.

    speed: operations per second of a large product.
    """
    affordable = (size for size in sizes if work(size) <= SECONDS * _SHARE * speed)
    return next(affordable, sizes[-1])


def _transformer_pass(network: STDiT3, latent: Sequence[int], batch: int) -> Callable[[], mx.array]:
    """Return a pass of the network on random latents, with text that is prepared."""
    config = network.config
    text = [_normal(_TEXT, config.caption_channels)] * batch
    conditions = network.prepare(text, latent, height=_HEIGHT, width=_WIDTH, fps=24)
    z, t = _normal(batch, *latent, config.in_channels), mx.full((batch,), 500.0)
    mx.eval(z, t)
    return lambda: network(z, t, conditions)


def _fit(
    work: Sequence[float], seconds: Sequence[float], network: nn.Module, most: float
) -> NetworkSpeed:
    """Return the speed that follows from a small and a large work of a network.

    most: operations per second of a large product, which no network outruns. If noise makes the
    two lie on no plausible line, the large one alone counts.
    """
    (small, large), (short, long) = work, seconds
    if short < long:
        speed = min((large - small) / (long - short), most)
        rest = short - small / speed
        if 0 <= rest < _MOST_REST * long:
            size = sum(value.nbytes for _, value in _leaves(network))
            return NetworkSpeed(speed, rest / size)
    return NetworkSpeed(large / long)


def _random(network: Module, dtype: mx.Dtype = mx.float32) -> Module:
    """Evaluate the random weights of a new network in a type, one tensor at a time."""
    network.set_dtype(dtype)
    for _, value in _leaves(network):
        mx.eval(value)
    return network


def _leaves(network: nn.Module) -> list[tuple[str, mx.array]]:
    return tree_flatten(network.parameters())  # type: ignore[return-value]


def _normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(0))
