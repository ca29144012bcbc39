"""What the step cache itself costs at the size of the published model: 144p, 51 frames, guided.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.step_cache_full [--runs 3] [--json FILE]

One random block pair at full width, in float32, stands for all 28. A step's seconds are 28 times
those of the pair, and what goes around the blocks; the cache's own are those of its calls, on
tokens of that size (random ones, of which an online rule finds none to reuse). Memory: what MLX
holds more between steps (of a network without blocks), and at its peak in a step whose blocks run,
against the planner's figure. Quality cannot be had from random weights; `benchmarks/pareto.py` has
it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip
from mlx.utils import tree_map

from benchmarks.common import RESULTS, arguments, markdown, seconds, write_json
from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.accel.step_cache import ResidualCache
from mlx_sora.memory.activations import residual_bytes
from mlx_sora.memory.flops import Grid
from mlx_sora.memory.limits import memory_scope, release
from mlx_sora.models.hooks import Hooks
from mlx_sora.models.stdit3 import BlockPair, STDiT3, STDiT3Config
from mlx_sora.request.techniques import StepCache
from mlx_sora.sampling.guidance import CFGSlice

GRID, HEIGHT, WIDTH, DEPTH, STEPS, BATCH = (15, 18, 32), 144, 256, 28, 30, 2
MODES = ("every:3", "every:3,order=1", "online", "online:threshold=0.15,order=1")


@dataclass(frozen=True)
class Row:
    """One mode. seconds: of the cache's own work in a step whose blocks run, and in one without;
    shares: of an exact step. bytes: kept between steps, more at the peak, and as planned.
    """

    mode: str
    computed_seconds: float
    cached_seconds: float | None
    computed_share: float
    cached_share: float | None
    kept: int
    peak: int
    planned: int


class Steps:
    """Evaluations of a network of `pairs` block pairs, each at its own flow time."""

    def __init__(self, pairs: int) -> None:
        self.network = STDiT3(replace(STDiT3Config(), depth=pairs))
        self.network.update(tree_map(_random, self.network.parameters()))
        config = self.network.config
        text = mx.random.normal((40, config.caption_channels))
        self.z = mx.random.normal((BATCH, *GRID, config.in_channels))
        self.conditions = self.network.prepare(
            [text] * BATCH, GRID, height=HEIGHT, width=WIDTH, fps=24.0
        )
        mx.eval(self.network.parameters(), self.z)
        self.stream = residual_bytes(config, Grid.from_latent(config, GRID, BATCH, 40))

    def __call__(self, step: int, cache: ResidualCache | None = None) -> None:
        stack = None if cache is None else cache.block_cache(step, CFGSlice(0, BATCH))
        # The latents move as they do in a run, so that an online rule has something to measure.
        z, t = self.z * (1 - step / (2 * STEPS)), mx.full((BATCH,), 1000.0 - step)
        context = Hooks[BlockPair](block_cache=stack)
        mx.eval(self.network(z, t, self.conditions, None, context))


def _random(x: mx.array) -> mx.array:
    return mx.random.normal(x.shape) * (x.shape[-1] ** -0.5)


def cache_of(mode: str) -> ResidualCache:
    return ResidualCache(StepCache.parse(mode), ScheduleInfo(STEPS, 1, GRID[0]))


def exact_seconds(steps: Steps, runs: int) -> float:
    """Of a whole step: 28 pairs, and what goes around them."""
    around = statistics.median(seconds(lambda: steps(9, _Known(steps))) for _ in range(runs))
    pair = statistics.median(seconds(lambda: steps(9)) for _ in range(runs)) - around
    return DEPTH * pair + around


class _Known(ResidualCache):
    """Hands out a sum that costs nothing, to time what goes around the blocks."""

    def __init__(self, steps: Steps) -> None:
        super().__init__(StepCache(each=1), ScheduleInfo(STEPS, 1, GRID[0]))

    def find(self, call: object, x: mx.array) -> mx.array:
        return mx.zeros((1, 1, 1, 1))


def own_seconds(mode: str, shape: tuple[int, ...], runs: int) -> tuple[float, float | None]:
    """Of the cache's calls in a step whose blocks run, and in one in which they do not."""
    cache, computed, cached = cache_of(mode), list[float](), list[float]()
    for step in range(5 + 3 * runs):
        x = mx.random.normal(shape) * (1 + step / 100)
        out = 2 * x
        mx.eval(x, out)

        def call(step: int = step, x: mx.array = x, out: mx.array = out) -> None:
            seam = cache.block_cache(step % STEPS, CFGSlice(0, BATCH))
            known = seam.cached_residual(x, mx.full((BATCH,), 1000.0 - step), None)
            if known is None:
                seam.update(x, out)
            else:
                mx.eval(x + known)

        before = cache.record()["evaluations_saved"]
        took = seconds(call)
        reused = cache.record()["evaluations_saved"] > before
        if step > 1:
            (cached if reused else computed).append(took)
    return statistics.median(computed), statistics.median(cached) if cached else None


def peak_of(work: Callable[[], None]) -> int:
    release()
    mx.reset_peak_memory()
    work()
    return mx.get_peak_memory()


def memory(steps: Steps, bare: Steps, mode: str, plain: int) -> tuple[int, int]:
    """Bytes that the cache holds after steps with blocks, and more at the peak of one.

    bare: without blocks, to fill the cache; plain: the peak without a cache.
    """
    release()
    before = mx.get_active_memory()
    cache = cache_of(mode)
    for step in range(3):
        bare(step, cache)
    release()
    kept = mx.get_active_memory() - before
    return kept, peak_of(lambda: steps(3, cache)) - plain


def main() -> None:
    options = arguments(__doc__ or "", 3, RESULTS / "step_cache_full.json")
    with memory_scope():
        steps, bare = Steps(1), Steps(0)
        for each in (steps, bare):
            each(0)
        exact = exact_seconds(steps, options.runs)
        plain = peak_of(lambda: steps(3))
        rows = []
        tokens = Grid.from_latent(steps.network.config, GRID, BATCH, 40)
        shape = (BATCH, tokens.frames, tokens.spatial_tokens, steps.network.config.hidden_size)
        for mode in MODES:
            own = own_seconds(mode, shape, options.runs)
            kept, peak = memory(steps, bare, mode, plain)
            planned = int(cache_of(mode).cached_residuals * steps.stream)
            share = None if own[1] is None else own[1] / exact
            rows.append(Row(mode, *own, own[0] / exact, share, kept, peak, planned))
            print(rows[-1], flush=True)
    print(f"an exact step: {exact:.1f} s")
    print(
        markdown(
            [
                "",
                "blocks run: s",
                "share",
                "cached: s",
                "share",
                "kept MB",
                "peak MB",
                "planned MB",
            ],
            [
                [
                    row.mode,
                    f"{row.computed_seconds:.3f}",
                    f"{row.computed_share:.2%}",
                    "–" if row.cached_seconds is None else f"{row.cached_seconds:.3f}",
                    "–" if row.cached_share is None else f"{row.cached_share:.2%}",
                    *(f"{n / 1e6:.0f}" for n in (row.kept, row.peak, row.planned)),
                ]
                for row in rows
            ],
        )
    )
    result = {"runs": options.runs, "exact_seconds": exact, "rows": [asdict(row) for row in rows]}
    write_json(Path(options.json), result)


if __name__ == "__main__":
    main()
