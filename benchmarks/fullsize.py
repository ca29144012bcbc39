"""How fast the networks run at their published sizes, as a share of this machine's matmul peak.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.fullsize [--runs 3] [--brief] [--name PREFIX]

Random weights of the true shapes: T5-XXL, STDiT3-XL/2, the VAE of version 1.2, in float32 on CPUs.
A work is made of units: one random block of T5 stands for all 24, one random pair of STDiT for all
28, and the VAE is its temporal network and batches of frames. Before and after each unit runs a
large square product: the peak is measured at the same times, on a machine that others use too.
--brief runs each kind of unit once and multiplies by how often the work has it.

FLOPs are counted in the reference's form; the engine needs fewer where the VAE enlarges images.
Rows already in the file, of other works or thread counts, stay. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)
from benchmarks.common import RESULTS, markdown, write_json

import mlx.core as mx  # isort: skip
from mlx import nn
from mlx.utils import tree_map

from mlx_sora import geometry
from mlx_sora.memory import flops
from mlx_sora.memory.limits import memory_scope, release
from mlx_sora.models import t5
from mlx_sora.models.hooks import Hooks, Unsharded
from mlx_sora.models.stdit3 import STDiT3, STDiT3Config
from mlx_sora.models.vae import VAEConfig, VideoVAE

#: Side of the square product that stands for the machine's peak.
SQUARE = 2560

FRAMES, CHUNK, PROMPT, PADDED = 51, 17, 40, 300

#: Least share of the matmul peak, by what a row's name begins with.
BARS = {"STDiT step": 0.85, "T5, 300": 0.75, "VAE decode": 0.60}

#: Wall and processor seconds.
Times = tuple[float, float]


@dataclass(frozen=True)
class Unit:
    """A part of a work, which has `times` of it."""

    run: Callable[[], mx.array]
    times: int = 1


@dataclass(frozen=True)
class Case:
    """A work at full size, and its floating-point operations."""

    name: str
    geometry: str
    flops: int
    units: Sequence[Unit]


@dataclass(frozen=True)
class Row:
    """Medians of a case's runs; shares are of the interleaved matmul peak, by wall and processor.

    seconds: wall time; processor_seconds: of all threads. measured: which part of the units ran.
    bytes: MLX's peak beyond weights and inputs; resident: with them (one block or pair).
    """

    name: str
    geometry: str
    threads: int
    runs: int
    measured: str
    seconds: float
    processor_seconds: float
    tflop: float
    gflops: float
    peak_gflops: float
    share: float
    share_by_processor: float
    bytes: int
    resident: int
    bar: float | None


def spent(work: Callable[[], mx.array]) -> Times:
    """What evaluating a work takes."""
    wall, processor = time.perf_counter(), time.process_time()
    mx.eval(work())
    return time.perf_counter() - wall, time.process_time() - processor


def added(parts: Sequence[Times]) -> Times:
    return sum(wall for wall, _ in parts), sum(processor for _, processor in parts)


class Square:
    """The large product whose speed is the machine's peak."""

    def __init__(self) -> None:
        self.side = normal(SQUARE, SQUARE)
        spent(self.product)

    def product(self) -> mx.array:
        return self.side @ self.side


def run(case: Case, square: Square, brief: bool) -> tuple[Times, Times]:
    """Seconds of the work, and of one square product, both from units and products in turn."""
    work: list[Times] = []
    peak = [spent(square.product)]
    for unit in case.units:
        count = 1 if brief else unit.times
        times = []
        for _ in range(count):
            times.append(spent(unit.run))
            peak.append(spent(square.product))
        wall, processor = added(times)
        work.append((wall * unit.times / count, processor * unit.times / count))
    wall, processor = added(peak)
    return added(work), (wall / len(peak), processor / len(peak))


def measure(case: Case, square: Square, runs: int, brief: bool) -> Row:
    """Nothing is warmed up: each run of a case takes seconds to minutes."""
    release()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    samples = [run(case, square, brief) for _ in range(runs)]
    peak_bytes = mx.get_peak_memory()
    product = 2 * SQUARE**3

    def median(value: Callable[[Times, Times], float]) -> float:
        return statistics.median(value(work, peak) for work, peak in samples)

    total = sum(unit.times for unit in case.units)
    return Row(
        name=case.name,
        geometry=case.geometry,
        threads=int(os.environ.get("OPENBLAS_NUM_THREADS", os.cpu_count() or 1)),
        runs=runs,
        measured=f"{len(case.units) if brief else total} of {total} units",
        seconds=median(lambda work, _: work[0]),
        processor_seconds=median(lambda work, _: work[1]),
        tflop=case.flops / 1e12,
        gflops=median(lambda work, _: case.flops / work[0] / 1e9),
        peak_gflops=median(lambda _, peak: product / peak[0] / 1e9),
        share=median(lambda work, peak: case.flops / work[0] * peak[0] / product),
        share_by_processor=median(lambda work, peak: case.flops / work[1] * peak[1] / product),
        bytes=peak_bytes - before,
        resident=peak_bytes - square.side.nbytes,
        bar=next((share for name, share in BARS.items() if case.name.startswith(name)), None),
    )


def normal(*shape: int) -> mx.array:
    out = mx.random.normal(shape)
    mx.eval(out)
    return out


def randomised(*networks: nn.Module) -> None:
    """Random matrices of the usual scale, so that no value is special; norms and biases stay."""

    def draw(value: mx.array) -> mx.array:
        if value.ndim < 2:
            return value
        out = mx.random.normal(value.shape) * value.shape[-1] ** -0.5
        mx.eval(out)
        return out

    for network in networks:
        network.update(tree_map(draw, network.parameters()))
        mx.eval(network.parameters())


def text_encoder(brief: bool) -> Iterator[Case]:
    config = t5.T5Config()
    block = t5.T5Block(config, has_bias=True)
    randomised(block)
    for tokens in (PROMPT, PADDED):
        x, bias = normal(1, tokens, config.d_model), block.position_bias(tokens)
        mx.eval(bias)
        yield Case(
            f"T5, {tokens} tokens",
            f"T5-XXL, {config.num_layers} blocks",
            flops.text_encoder_flops(config, tokens),
            [Unit(lambda x=x, bias=bias: block(x, bias), config.num_layers)],
        )


def transformer(brief: bool) -> Iterator[Case]:
    config = STDiT3Config()
    pair, ends = STDiT3(replace(config, depth=1)), STDiT3(replace(config, depth=0))
    randomised(pair, ends)
    for resolution in ("144p", "240p"):
        size = geometry.get_image_size(resolution)
        latent = geometry.plan_geometry(size, FRAMES).latent
        text = [normal(PROMPT, config.caption_channels)] * 2
        known = pair.prepare(text, latent, height=size.height, width=size.width, fps=24)
        grid = flops.Grid.from_latent(config, latent, 2, PROMPT)
        x = normal(2, grid.frames, grid.spatial_tokens, config.hidden_size)
        modulation = 0.1 * normal(2, 1, 6, config.hidden_size)
        z, t = normal(2, *latent, config.in_channels), mx.array([500.0, 500.0])
        # Text keys and values are a run's, not a step's: they are there from here on.
        mx.eval(pair._run_blocks(x[:, :1, :1], modulation, known, Hooks(), Unsharded()), known.fps)

        def blocks(x: mx.array = x, m: mx.array = modulation, known: Any = known) -> mx.array:
            return pair._run_blocks(x, m, known, Hooks(), Unsharded())

        def rest(z: mx.array = z, t: mx.array = t, known: Any = known) -> mx.array:
            return ends(z, t, known)

        both = flops.transformer_flops(pair.config, grid)
        shape = f"2 x {grid.frames} x {grid.spatial_tokens}"
        where = f"{FRAMES} frames, CFG: {shape} tokens, {PROMPT} of text"
        yield Case(
            f"STDiT block pair, {resolution}",
            where,
            both - flops.transformer_flops(ends.config, grid),
            [Unit(blocks)],
        )
        yield Case(
            f"STDiT step, {resolution}",
            where,
            flops.transformer_flops(config, grid),
            [Unit(blocks, config.depth), Unit(rest)],
        )


def autoencoder(brief: bool) -> Iterator[Case]:
    """Decoding and encoding a chunk; --brief in batches of one frame."""
    config = VAEConfig()
    plan = geometry.plan_geometry(geometry.get_image_size("240p"), CHUNK)
    (latents, h, w), (width, height) = plan.latent, plan.decoded
    batch = 1 if brief else config.micro_batch_size or CHUNK
    where = f"{CHUNK} frames of {width} x {height}, in batches of {batch}"

    def batches(one: Callable[[mx.array], mx.array], frames: mx.array) -> list[Unit]:
        units = [Unit(lambda: one(frames[:batch]), CHUNK // batch)]
        left = CHUNK % batch
        return [*units, Unit(lambda: one(frames[:left]))] if left else units

    vae = VideoVAE(config, ("decoder",))
    randomised(vae)
    z, cells = normal(1, latents, h, w, 4), normal(batch, h, w, 4)
    temporal = flops.temporal_decoder_flops(config.temporal, latents, h, w)
    yield Case(
        "VAE decode",
        where,
        temporal + CHUNK * flops.spatial_decoder_flops(config.spatial, h, w),
        [
            Unit(lambda: vae.temporal_vae.decode(z, CHUNK)),
            *batches(vae.spatial_vae.decode, cells),
        ],
    )
    del vae
    release()
    vae = VideoVAE(config, ("encoder",))
    randomised(vae)
    frames, seen = normal(batch, height, width, 3), normal(1, CHUNK, h, w, 4)
    temporal = flops.temporal_encoder_flops(config.temporal, CHUNK, h, w)
    yield Case(
        "VAE encode",
        where,
        temporal + CHUNK * flops.spatial_encoder_flops(config.spatial, height, width),
        [Unit(lambda: vae.temporal_vae.encode(seen)), *batches(vae.spatial_vae.encode, frames)],
    )


def show(rows: Sequence[Row]) -> str:
    headings = ["work", "geometry", "threads", "seconds", "TFLOP", "GFLOP/s of peak", "share"]
    headings += ["by processor time", "bar", "GiB beside weights", "measured"]
    return markdown(
        headings,
        [
            [
                row.name,
                row.geometry,
                str(row.threads),
                f"{row.seconds:.3g}",
                f"{row.tflop:.3g}",
                f"{row.gflops:.0f} of {row.peak_gflops:.0f}",
                f"{row.share:.0%}",
                f"{row.share_by_processor:.0%}",
                f"{row.bar:.0%}" if row.bar else "",
                f"{row.bytes / 2**30:.2f}",
                row.measured,
            ]
            for row in rows
        ],
    )


def keep(path: Path, row: Row) -> None:
    """Put a row into the file, in place of the one it replaces; ordered by threads and name."""
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    both = {(kept["threads"], kept["name"]): kept for kept in (*old, asdict(row))}
    write_json(path, {"rows": [both[key] for key in sorted(both)]})


#: By the first word of their works' names.
NETWORKS = {"T5": text_encoder, "STDiT": transformer, "VAE": autoencoder}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="default 3")
    parser.add_argument("--brief", action="store_true", help="each kind of unit once per run")
    parser.add_argument("--name", default="", help="only works whose name begins so")
    parser.add_argument("--json", type=Path, default=RESULTS / "fullsize.json")
    options = parser.parse_args()
    rows = []
    with memory_scope():
        square = Square()
        for network, cases in NETWORKS.items():
            if not (network.startswith(options.name) or options.name.startswith(network)):
                continue
            for case in cases(options.brief):
                if case.name.startswith(options.name):
                    rows.append(measure(case, square, options.runs, options.brief))
                    keep(options.json, rows[-1])
                    print(show(rows[-1:]), flush=True)
            release()
    return 0 if all(row.bar is None or row.share >= row.bar for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
