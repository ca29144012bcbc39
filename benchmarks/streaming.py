"""What reading blocks while others compute (CI-DL) hides and costs, at the width of STDiT3-XL/2.

    python -m benchmarks.streaming [--runs 3] [--depth 6] [--json FILE]

A transformer of `--depth` random block pairs in float32 makes guided and unguided evaluations, all
resident and streamed: from the page cache, and through a reader that is no faster than a disk of 1
or 2 GB/s. Hidden is the share of min(loading, computing) that prefetching takes off the time of a
pass without it. Memory is MLX's peak beyond what all configurations hold.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip

from benchmarks.common import RESULTS, alternate, arguments, markdown, write_json
from benchmarks.full_model import random_transformer
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_transformer, stream_transformer
from mlx_sora.loading.safetensors import TensorInfo, load_tensors
from mlx_sora.memory.limits import release
from mlx_sora.models.hooks import Hooks, NoMerging, TokenMerging
from mlx_sora.models.stdit3 import BlockPair, STDiT3

#: Latent frames, height and width; pixels of a frame.
Shape = tuple[tuple[int, int, int], tuple[int, int]]

#: An image at 144p computes about as long as a pair takes to load; 17 frames much longer.
IMAGE: Shape = (1, 18, 32), (144, 256)
CLIP: Shape = (5, 18, 32), (144, 256)

RATES = (1e9, 2e9)
PROMPT_TOKENS = 20


@dataclass(frozen=True)
class Throttled:
    """Reads as a disk of `rate` bytes per second would, were the page cache empty."""

    rate: float

    def __call__(
        self, file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None
    ) -> dict[str, mx.array]:
        started = time.perf_counter()
        arrays = load_tensors(file, tensors, stream)
        mx.eval(arrays)
        due = started + sum(info.nbytes for info in tensors.values()) / self.rate
        time.sleep(max(0.0, due - time.perf_counter()))
        return arrays


@dataclass(frozen=True)
class Hidden:
    """One disk and one kind of pass: seconds per pass, and the share of loading that is hidden.

    one_block: bytes of a block pair; prefetch_bytes: what prefetching adds to the peak.
    """

    work: str
    rate: float
    load: float
    compute: float
    plain: float
    prefetch: float
    hidden: float
    one_block: int
    prefetch_bytes: int


@dataclass(frozen=True)
class Cached:
    """Streaming from the page cache against all resident: median ratio of seconds per pass."""

    work: str
    resident: float
    streamed: float
    ratio: float


class Passes:
    """Evaluations of one network for one shape. batch: 2 with guidance, else 1."""

    def __init__(self, network: STDiT3, shape: Shape, batch: int) -> None:
        grid, (height, width) = shape
        text = mx.random.normal((PROMPT_TOKENS, network.config.caption_channels))
        self.network = network
        self.z = mx.random.normal((batch, *grid, network.config.in_channels))
        self.t = mx.full((batch,), 500.0)
        self.conditions = network.prepare(
            [text] * batch, grid, height=height, width=width, fps=24.0
        )

    def __call__(
        self, blocks: BlockStream[BlockPair] | None = None, tokens: TokenMerging | None = None
    ) -> None:
        context = Hooks[BlockPair](blocks, tokens or NoMerging())
        mx.eval(self.network(self.z, self.t, self.conditions, None, context))


@contextmanager
def resident(model: ModelFolder, shape: Shape, batch: int) -> Iterator[Callable[[], None]]:
    """A pass with all blocks in memory."""
    yield Passes(load_transformer(model, mx.float32), shape, batch)


@contextmanager
def streamed(
    model: ModelFolder, shape: Shape, batch: int, rate: float | None, prefetch: bool
) -> Iterator[tuple[Callable[[], None], BlockStream[BlockPair]]]:
    """A pass with no block staying, and its stream. rate: of the disk; None is the page cache."""
    network, source = stream_transformer(model, mx.float32)
    if rate is not None:
        source = replace(source, reader=Throttled(rate))
    with BlockStream(source, cyclic=True, prefetch=prefetch) as stream:
        yield partial(Passes(network, shape, batch), stream), stream


def peak_of(work: Callable[[], None]) -> int:
    """MLX's peak in bytes over one pass."""
    release()
    mx.reset_peak_memory()
    work()
    return mx.get_peak_memory()


def measure_hidden(model: ModelFolder, name: str, batch: int, rate: float, runs: int) -> Hidden:
    """Time passes resident, streamed on demand and streamed ahead, in turn."""
    with ExitStack() as stack:
        compute = stack.enter_context(resident(model, IMAGE, batch))
        plain, stream = stack.enter_context(streamed(model, IMAGE, batch, rate, False))
        ahead, _ = stack.enter_context(streamed(model, IMAGE, batch, rate, True))
        for work in (compute, plain, ahead):
            work()
        loads, seconds = stream.stats.loads, stream.stats.load_seconds
        times = alternate(runs, compute, plain, ahead)
        passes = (stream.stats.loads - loads) / len(stream.source)
        load = (stream.stats.load_seconds - seconds) / passes
        block = max(stream.source.nbytes)
    computing, on_demand, prefetched = (
        statistics.median(column) for column in zip(*times, strict=True)
    )
    hidden = statistics.median((b - c) / min(load, a) for a, b, c in times)
    peaks = []
    for prefetch in (False, True):
        with streamed(model, IMAGE, batch, rate, prefetch) as (work, _):
            work()
            peaks.append(peak_of(work))
        release()
    extra = peaks[1] - peaks[0]
    return Hidden(name, rate, load, computing, on_demand, prefetched, hidden, block, extra)


def measure_cached(model: ModelFolder, name: str, shape: Shape, batch: int, runs: int) -> Cached:
    """Time passes resident and streamed from the page cache, in turn."""
    with (
        resident(model, shape, batch) as compute,
        streamed(model, shape, batch, None, True) as (ahead, _),
    ):
        compute()
        ahead()
        times = alternate(runs, compute, ahead)
    ratio = statistics.median(b / a for a, b in times)
    return Cached(name, *(statistics.median(column) for column in zip(*times, strict=True)), ratio)


def show(hidden: list[Hidden], cached: list[Cached]) -> str:
    """Both tables."""
    first = markdown(
        ["pass", "disk", "load s", "compute s", "on demand", "ahead", "hidden", "memory, blocks"],
        [
            [
                row.work,
                f"{row.rate / 1e9:.0f} GB/s",
                *(f"{s:.2f}" for s in (row.load, row.compute, row.plain, row.prefetch)),
                f"{row.hidden:.0%}",
                f"{row.prefetch_bytes / row.one_block:+.2f}",
            ]
            for row in hidden
        ],
    )
    second = markdown(
        ["pass, page cache", "resident s", "streamed s", "ratio"],
        [
            [row.work, f"{row.resident:.2f}", f"{row.streamed:.2f}", f"{row.ratio:.3f}"]
            for row in cached
        ],
    )
    return f"{first}\n\n{second}"


def main() -> None:
    options = arguments(__doc__ or "", 3, RESULTS / "streaming.json", depth=6)
    with random_transformer(options.depth) as model:
        hidden = [
            measure_hidden(model, name, batch, rate, options.runs)
            for name, batch in (("144p image, guided", 2), ("144p image, unguided", 1))
            for rate in RATES
        ]
        cached = [
            measure_cached(model, "144p image, guided", IMAGE, 2, options.runs),
            measure_cached(model, "144p, 17 frames, guided", CLIP, 2, options.runs),
        ]
    print(show(hidden, cached))
    rows = {"hidden": [asdict(row) for row in hidden], "cached": [asdict(row) for row in cached]}
    write_json(options.json, {"runs": options.runs, "depth": options.depth, **rows})


if __name__ == "__main__":
    main()
