"""Distillation of a quantized transformer, as DWQ of mlx-lm: it learns from the one it came from.

Scales and biases of its layers change until it predicts the velocities that the model of floats
predicts on its own paths. Form, bytes and speed stay the same. The paths come first, so that only
one of the two networks is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers
from mlx.utils import tree_map, tree_unflatten

from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import WeightsError, shell_words
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.models.hooks import Hooks, ResidentBlocks
from mlx_sora.models.quantized import AFFINE, QuantizedLinear
from mlx_sora.models.stdit3 import BlockPair, KeysValues, STDiT3, STDiT3Block
from mlx_sora.pipeline.calibrate import exact_path
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.generate import prepare
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.pipeline.stages import encode_text
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.sampling.base import Step

#: Points of paths in a step of learning.
BATCH = 8

#: Latents, channels aside, whose gradient is computed at a time, for one point at least. If a step
#: has more, blocks keep their inputs only.
CELLS = 4096

#: First step size, relative to the scales. It falls to zero.
RATE = 2e-3

#: Weight of the errors of cond and uncond alone, beside that of the guided velocity.
HALVES = 0.25


@dataclass(frozen=True)
class Point:
    """Latents on a path, and what the model of floats predicts there.

    run: number of the path. z, cond, uncond: [1, T, H, W, C]. t: flow time. dt: of the step.
    """

    run: int
    z: mx.array
    t: float
    dt: float
    cond: mx.array
    uncond: mx.array


class LearningLinear(nn.Module):
    """Quantized layer that learns changes of scales and biases, relative to its scales.

    Codes stay: to learn them too gained nothing on the bundled model.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self._layer = {**layer}
        self._form = layer.form
        self.scales, self.biases = mx.zeros_like(layer.scales), mx.zeros_like(layer.scales)

    @property
    def weight(self) -> mx.array:
        """Codes [outputs, words]; `ops.linear` divides work on GPUs by their number of rows."""
        return self._layer["weight"]  # type: ignore[no-any-return]

    def arrays(self) -> dict[str, mx.array]:
        """Return the learned weight as arrays by parameter."""
        scales, biases = self._layer["scales"], self._layer["biases"]
        floats = {"scales": scales * (1 + self.scales), "biases": biases + scales * self.biases}
        return {"weight": self.weight, **floats}

    def __call__(self, x: mx.array) -> mx.array:
        weight, bias = self._form.restore(self.arrays()), self._layer.get("bias")
        return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


class CheckpointedBlock:
    """Block that keeps its inputs only, and computes the rest again for the gradient."""

    def __init__(self, block: STDiT3Block) -> None:
        self.block, self.cross_attn = block, block.cross_attn

    def __call__(self, x: mx.array, modulation: mx.array, text: KeysValues, *rest: Any) -> mx.array:
        """Return x after the block, as that does."""
        block = self.block

        def compute(parameters: Any, *inputs: mx.array) -> mx.array:
            block.update(parameters)
            x, modulation, keys, values = inputs
            return block(x, modulation, (keys, values), *rest)

        out: mx.array = mx.checkpoint(compute)(block.trainable_parameters(), x, modulation, *text)
        return out


def distill(
    model: ModelFolder,
    quantized: ModelFolder,
    requests: Sequence[GenerationRequest],
    steps: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, mx.array]:
    """Return the arrays of the transformer of `quantized` that learned from `model`, by key.

    requests: differ in prompt and seed. steps: of learning. on_progress: called with the number of
    finished paths and steps. Raises WeightsError if the velocities become NaN or Inf.
    """
    requests = [request.with_seed() for request in requests]
    with _open_predictor(Engine(model, "auto", Ranks()), requests) as (run, predictor):
        channels = predictor.network.config.in_channels
        points: list[Point] = []
        for number, request in enumerate(requests):
            path = _measure_path(prepare(run.engine, request), predictor, number, channels)
            points.extend(path)
            on_progress(number + 1)
    del predictor
    whole = [replace(request, memory_budget="off") for request in requests]
    with _open_predictor(Engine(quantized, "float32", Ranks()), whole) as (run, predictor):
        layers = _insert_learning_layers(predictor.network)
        losses = _learn(predictor, points, run.settings.guidance, steps)
        for done, loss in enumerate(losses, start=len(requests) + 1):
            if not np.isfinite(loss):
                raise WeightsError(
                    f"The velocities of {model.name} are NaN or Inf.",
                    f"Check the model: python -m mlx_sora doctor {shell_words(model.path)}",
                )
            on_progress(done)
        return {
            f"{path}.{name}": array
            for path, layer in layers.items()
            for name, array in layer.arrays().items()
        }


@dataclass(frozen=True)
class _Predictor:
    """The transformer, the texts of all runs, and their sizes."""

    network: STDiT3
    hooks: Hooks[BlockPair]
    texts: Sequence[mx.array]
    run: GenerationRun

    def __call__(self, runs: Sequence[int], z: mx.array, t: mx.array) -> tuple[mx.array, mx.array]:
        """Return cond and uncond of `runs` at z [B, T, H, W, C] and flow times t [B]."""
        settings, texts = self.run.settings, [self.texts[run] for run in runs]
        args = settings.model_args
        null = [self.network.null_text(len(text)) for text in texts]
        both = self.network.prepare(
            [*texts, *null],
            settings.geometry.latent,
            height=args.height,
            width=args.width,
            fps=args.fps,
        )
        v = self.network(mx.concatenate([z, z]), mx.tile(t, 2), both, None, self.hooks)
        cond, uncond = mx.split(v[..., : z.shape[-1]], 2)
        return cond, uncond


@contextmanager
def _open_predictor(
    engine: Engine, requests: Sequence[GenerationRequest]
) -> Iterator[tuple[GenerationRun, _Predictor]]:
    """Encode the texts of the requests and open the transformer."""
    runs, texts = [prepare(engine, request) for request in requests], dict[str, mx.array]()
    for _ in encode_text(runs, texts, engine.ranks):
        pass
    run, plan = runs[0], runs[0].plan.stage("denoise")
    with run.loader.stage(plan), run.loader.transformer(plan) as (network, blocks):
        states = [texts[each.settings.texts[0]] for each in runs]
        yield run, _Predictor(network, Hooks(blocks), states, run)


def _measure_path(
    run: GenerationRun, predict: _Predictor, number: int, channels: int
) -> Iterator[Point]:
    """Yield the points of the exact path of a run."""
    found: list[tuple[mx.array, mx.array]] = []

    def velocity(z: mx.array, t: mx.array, step: Step) -> mx.array:
        cond, uncond = predict([number], z, t)
        found.append((cond, uncond))
        return uncond + run.settings.guidance * (cond - uncond)

    for step in exact_path(run, velocity, channels):
        yield Point(number, step.z_in, step.t, _number(step.step.dt), *found.pop())


def _insert_learning_layers(network: nn.Module) -> dict[str, LearningLinear]:
    """Replace the affine layers by those that learn; nothing else does."""
    layers = {
        path: LearningLinear(layer)
        for path, layer in network.named_modules()
        if isinstance(layer, QuantizedLinear) and layer.form.mode == AFFINE
    }
    network.freeze()
    network.update_modules(tree_unflatten(list(layers.items())))
    for layer in layers.values():
        layer.unfreeze()
    return layers


def _learn(
    predictor: _Predictor, points: Sequence[Point], guidance: float, steps: int
) -> Iterator[float]:
    """Make steps of learning; yield the error of each."""
    network, size = predictor.network, min(BATCH, len(points))
    together = max(1, CELLS // math.prod(points[0].z.shape[:-1]))
    if together < size:
        pairs = zip(network.spatial_blocks, network.temporal_blocks, strict=True)
        blocks: Any = [tuple(map(CheckpointedBlock, pair)) for pair in pairs]
        predictor = replace(predictor, hooks=Hooks(ResidentBlocks(blocks)))
    error = partial(_error, predictor, guidance)
    gradient, rng = nn.value_and_grad(network, error), np.random.default_rng(0)
    optimizer = optimizers.Adam(
        optimizers.cosine_decay(RATE, steps), betas=[0.9, 0.99], eps=1e-12, bias_correction=True
    )
    for _ in range(steps):
        chosen = [points[i] for i in rng.choice(len(points), size, replace=False)]
        parameters, total, sums = network.trainable_parameters(), 0.0, dict[str, Any]()
        for start in range(0, size, together):
            loss, gradients = gradient(chosen[start : start + together])
            network.update(parameters)
            sums = tree_map(mx.add, sums, gradients) if sums else gradients
            mx.eval(loss, sums)
            total += _number(loss) / size
        optimizer.update(network, sums)
        mx.eval(network.parameters(), optimizer.state)
        yield total


def _number(x: mx.array) -> float:
    return float(x.item())  # type: ignore[arg-type]


def _error(predict: _Predictor, guidance: float, points: Sequence[Point]) -> mx.array:
    """Return the sum of squared errors: of guided velocities, and of cond and uncond in part."""
    z, cond, uncond = (
        mx.concatenate([getattr(point, name) for point in points])
        for name in ("z", "cond", "uncond")
    )
    times = mx.array([point.t for point in points])
    found = predict([point.run for point in points], z, times)
    first, second = found[0] - cond, found[1] - uncond
    guided = second + guidance * (first - second)
    squares = mx.square(guided) + HALVES * (mx.square(first) + mx.square(second))
    # Errors of successive steps are alike and add up: each counts as far as it leads.
    weights = mx.array([point.dt for point in points])
    return (weights * squares.mean(axis=(1, 2, 3, 4))).sum()
