"""Calibration of token merging: find what may merge for a speed at the least error.

On the exact path of a few prompts, merging is tried at each site of each quarter of the blocks, in
the middle step of each tenth of the steps: how far does its velocity lead away from the path? The
deviations are kept as vectors, because those of neighbouring steps point the same way while those
of different sites hardly do. The sum of the chosen ones estimates the error of merging them all.
The choice is greedy: next comes what adds the least squared error per saved operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_sora import __version__
from mlx_sora.accel import Accelerations
from mlx_sora.accel.merging_table import MergingTable, Part
from mlx_sora.accel.tdtm import MergedSites
from mlx_sora.distributed.partition import split_evenly
from mlx_sora.errors import UsageError
from mlx_sora.memory.flops import Grid, transformer_flops
from mlx_sora.models.hooks import TokenMerging
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.pipeline.calibrate import exact_path, probed_transformer
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.generate import prepare
from mlx_sora.pipeline.locks import model_lock
from mlx_sora.pipeline.pipeline import Pipeline
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.request.techniques import SITES, Tdtm
from mlx_sora.video.similarity import Similarity, motion

if TYPE_CHECKING:
    import numpy as np

#: Most groups of successive blocks, and of successive steps, that merge or not.
BLOCK_GROUPS, STEP_GROUPS = 4, 10

#: Scalar products of the parts' deviations, as shares of the squared length of the path.
Products = Sequence[Sequence[float]]


class MergingProbe(Accelerations):
    """Token merging that is set for each evaluation."""

    merging: TokenMerging | None = None

    def token_merging(self, step: int) -> TokenMerging | None:
        return self.merging


@dataclass(frozen=True)
class Savings:
    """Operations of one exact step, and those that merging at a site saves in one block pair."""

    step: int
    saved: Mapping[str, float]

    @classmethod
    def of(cls, config: STDiT3Config, grid: Grid) -> Savings:
        """Count them for a grid of tokens."""
        step = transformer_flops(config, grid)
        merged = {site: transformer_flops(config, grid, [(site,)] * config.depth) for site in SITES}
        return cls(step, {site: (step - own) / config.depth for site, own in merged.items()})

    def most(self, depth: int) -> float:
        """Return the speed of a step if everything merges."""
        saved = sum(own for site, own in self.saved.items() if not site.endswith("-kv"))
        return self.step / (self.step - depth * saved)


def merging_parts(depth: int, steps: int) -> list[Part]:
    """Return all parts of a model and run that merge or not."""
    blocks = split_evenly(depth, min(BLOCK_GROUPS, depth))
    groups = split_evenly(steps, min(STEP_GROUPS, steps))
    return [
        Part(site, (own[0], own[-1]), (group[0], group[-1]))
        for group, own, site in product(groups, blocks, SITES)
    ]


def calibrate_merging(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    speed: float,
    on_progress: Callable[[int], None] = lambda done: None,
) -> MergingTable:
    """Return the table that reaches `speed` for the size and steps of `requests`.

    These differ in prompt and seed. on_progress: called with the number of finished prompts.
    Raises UsageError, before the search, for a speed that no merging reaches.
    """
    runs = [prepare(engine, request.with_seed()) for request in requests]
    run, config = runs[0], engine.transformer_config
    settings = run.settings
    savings = _savings(run)
    if (most := savings.most(config.depth)) < speed:
        least = int(most * 1000) / 1000
        text = f"Merging everywhere makes the steps {most:.3f} times as fast, not {speed:g} times."
        raise UsageError(text, f"Give --tdtm {least:g} or less.")
    parts = merging_parts(config.depth, settings.steps)
    total = mx.zeros((len(parts), len(parts)))
    with model_lock(engine.model.path):
        for done, each in enumerate(runs, start=1):
            total = total + measure(each, parts)
            on_progress(done)
    products: Products = (total / len(runs)).tolist()  # type: ignore[assignment]
    return MergingTable(
        model=settings.model,
        blocks=config.depth,
        steps=settings.steps,
        width=settings.geometry.size.width,
        height=settings.geometry.size.height,
        num_frames=settings.geometry.num_frames,
        parts=tuple(choose(parts, products, savings, settings.steps, speed)),
        about={
            "guidance": settings.guidance,
            "prompts": len(requests),
            "text_tokens": run.workload.text_tokens,
            "mlx_sora": __version__,
        },
    )


@dataclass(frozen=True)
class MotionCheck:
    """Videos with merging against the same without. motion: its share that remains."""

    prompts: int
    similarity: Similarity
    motion: float

    def __str__(self) -> str:
        """Return both for people."""
        count = f"{self.prompts} prompt{'s' * (self.prompts > 1)}"
        return f"with merging, on {count}: {self.similarity}, motion {self.motion:.1%} of exact"


def check_motion(
    pipeline: Pipeline, requests: Sequence[GenerationRequest], tdtm: Tdtm
) -> MotionCheck:
    """Make the videos of `requests` with and without merging, and compare them."""
    similarity, exact_motion, merged_motion = Similarity(), 0.0, 0.0
    for request in requests:
        exact = _frames(pipeline, request)
        merged = _frames(pipeline, replace(request, tdtm=tdtm))
        similarity.add(merged, exact)
        exact_motion += motion(exact)
        merged_motion += motion(merged)
    return MotionCheck(len(requests), similarity, merged_motion / max(exact_motion, 1e-9))


def _frames(pipeline: Pipeline, request: GenerationRequest) -> np.ndarray:
    frames = pipeline(request).frames
    assert frames is not None, "a request without an output keeps them"
    return frames


def _savings(run: GenerationRun) -> Savings:
    workload, config = run.workload, run.engine.transformer_config
    latent = workload.geometry.latent
    grid = Grid.from_latent(config, latent, workload.batch, workload.text_tokens)
    return Savings.of(config, grid)


def measure(run: GenerationRun, parts: Sequence[Part]) -> mx.array:
    """Return the `Products` of all parts [parts, parts] on the exact path of one prompt."""
    probe_steps = {part.steps: sum(part.steps) // 2 for part in parts}
    deviations: dict[Part, mx.array] = {}
    length, weights = mx.zeros(1), dict.fromkeys(probe_steps, mx.zeros(1))
    with probed_transformer(run, MergingProbe) as (velocity, channels, probe):
        for exact in exact_path(run, velocity, channels):
            step = exact.step
            length = length + exact.v * step.dt
            for own in weights:
                if own[0] <= step.index <= own[1]:
                    weights[own] = weights[own] + step.dt
            for part in (part for part in parts if probe_steps[part.steps] == step.index):
                blocks = range(part.blocks[0], part.blocks[1] + 1)
                probe.merging = MergedSites((part.site,), blocks)
                deviations[part] = velocity(exact.z_in, step.t, step) - exact.v
                mx.eval(deviations[part])
            probe.merging = None
    rows = [(deviations[part] * weights[part.steps]).reshape(-1) for part in parts]
    vectors = mx.stack(rows)
    products = vectors @ vectors.T / (length * length).sum()
    mx.eval(products)
    return products


def choose(
    parts: Sequence[Part], products: Products, savings: Savings, steps: int, speed: float
) -> Iterator[Part]:
    """Yield parts in the order in which they pay, until they reach a speed of `steps` steps.

    A site takes the place of its keys and values alone. products: as `measure` returns.
    """
    place = {(part.site, part.blocks, part.steps): n for n, part in enumerate(parts)}
    keys_of = [place.get((f"{part.site}-kv", part.blocks, part.steps)) for part in parts]
    work = [savings.saved[p.site] * _length(p.blocks) * _length(p.steps) for p in parts]
    chosen, left = set[int](), set(range(len(parts)))
    sums = [0.0] * len(parts)  # of the products with all that is chosen
    exact, saved, error = savings.step * steps, 0.0, 0.0

    def signs(n: int) -> dict[int, int]:
        """Return the parts that part n adds (1) and replaces (-1)."""
        keys = keys_of[n]
        return {n: 1, keys: -1} if keys is not None and keys in chosen else {n: 1}

    def change(n: int) -> tuple[float, float]:
        """Return what part n adds to the squared error, and saves."""
        own = signs(n).items()
        added = sum(2 * sign * sums[i] for i, sign in own)
        added += sum(a * b * products[i][j] for i, a in own for j, b in own)
        return added, sum(sign * work[i] for i, sign in own)

    while saved < exact * (1 - 1 / speed) and left:
        best = min(left, key=lambda n: change(n)[0] / change(n)[1])
        added, gain = change(best)
        for i, sign in signs(best).items():
            sums = [old + sign * more for old, more in zip(sums, products[i], strict=True)]
        chosen.add(best)
        left -= {best, keys_of[best]}
        saved, error = saved + gain, error + added
        reached, size = exact / (exact - saved), max(error, 0.0) ** 0.5
        yield replace(parts[best], speed=round(reached, 6), error=round(size, 6))


def _length(ends: Sequence[int]) -> int:
    return ends[1] - ends[0] + 1
