"""Second moments of the inputs of a model's layers, measured on a few prompts.

They say what a layer is used for: `models/gptq.py` rounds weights with the least error for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

from mlx_sora.accel import Accelerations
from mlx_sora.errors import WeightsError, shell_words
from mlx_sora.models.precision import STATISTICS
from mlx_sora.pipeline.calibrate import exact_path
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.generate import prepare, schedule_info
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.pipeline.stages import clip_guidance, clip_transformer, encode_text
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.device import total_memory
from mlx_sora.text.encoder import encode_tokens

#: Share of the RAM for moments, at least those of a block: a block of STDiT has 0.12 GB of them, of
#: T5-XXL 0.62 GB. The prompts are made again for each group of blocks that fits.
SHARE = 0.25

#: Prompts of which STDiT makes all steps. Of the others it makes the first, for the layers whose
#: input is the text: a few texts are too few for those.
VIDEOS = 12

#: Most inputs that one call of a layer adds, evenly spaced among all of them.
ROWS = 4096

#: Layers of T5 with the input of another one.
_SAME_INPUT = {"k": "q", "v": "q", "wi_1": "wi_0"}

#: Number of inputs of each layer of a block, by path.
Layers = Mapping[str, int]


class InputMoments:
    """Sum of xᵀ x [inputs, inputs], float32, over inputs x of a layer."""

    def __init__(self, inputs: int) -> None:
        self.total = mx.zeros((inputs, inputs))

    def add(self, x: mx.array) -> None:
        """Add inputs x [..., inputs]."""
        rows = x.reshape(-1, x.shape[-1])
        rows = rows[:: -(-len(rows) // ROWS)].astype(STATISTICS)
        self.total = mx.addmm(self.total, rows.T, rows)
        mx.eval(self.total)


class MeasuredLinear(nn.Linear):
    """Linear layer that adds its inputs to `moments`."""

    def __init__(self, layer: nn.Linear, moments: InputMoments) -> None:
        nn.Module.__init__(self)
        for name, value in layer.items():
            self[name] = value
        self.moments = moments

    def __call__(self, x: mx.array) -> mx.array:
        self.moments.add(x)
        return super().__call__(x)


def measure_moments(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    part: str,
    blocks: Sequence[Layers],
    on_progress: Callable[[int], None] = lambda done: None,
) -> Iterator[dict[str, mx.array]]:
    """Yield, for each of `blocks` of T5 or STDiT, the `part`, the moments by path.

    engine: of a model that is not quantized. requests: differ in prompt and seed. on_progress:
    called with the number of finished prompts. What is yielded for a block does not depend on the
    others. Raises WeightsError for a model that computes NaN or Inf.
    """
    runs = [prepare(engine, request.with_seed()) for request in requests]
    texts: dict[str, mx.array] = {}
    if part == "transformer":
        for _ in encode_text(runs, texts, engine.ranks):
            pass
    for group in _groups(blocks, int(SHARE * total_memory())):
        inputs = {_source(path): n for block in group for path, n in block.items()}
        found = {path: InputMoments(n) for path, n in inputs.items()}
        measure = _encode if part == "text_encoder" else partial(_denoise, texts=texts)
        for done, _ in enumerate(measure(runs, found) if found else (), start=1):
            on_progress(done)
        for path, moments in found.items():
            if not mx.isfinite(moments.total).all().item():
                raise WeightsError(
                    f"{path} of {engine.model.name} gets NaN or Inf.",
                    f"Check the model: python -m mlx_sora doctor {shell_words(engine.model.path)}",
                )
        for block in group:
            sources = {path: _source(path) for path in block}
            yield {path: found[source].total for path, source in sources.items()}
            for source in sources.values():
                found.pop(source, None)


def _source(path: str) -> str:
    """Return the path of the layer whose moments are those of the layer at `path`."""
    stem, _, name = path.rpartition(".")
    return f"{stem}.{_SAME_INPUT.get(name, name)}"


def _groups(blocks: Sequence[Layers], limit: int) -> Iterator[list[Layers]]:
    """Yield successive blocks, as many at a time as have moments of `limit` bytes."""
    group: list[Layers] = []
    used = 0
    for block in blocks:
        sizes = {_source(path): STATISTICS.size * n * n for path, n in block.items()}
        if group and used + sum(sizes.values()) > limit:
            yield group
            group, used = [], 0
        group.append(block)
        used += sum(sizes.values())
    if group:
        yield group


def _encode(runs: Sequence[GenerationRun], found: Mapping[str, InputMoments]) -> Iterator[None]:
    """Encode the texts of all runs with measured layers."""
    largest = max(runs, key=lambda run: run.plan.stage("encode").peak)
    plan, dtype = largest.plan.stage("encode"), largest.engine.precision.text_encoder
    loader = largest.loader
    with loader.stage(plan), loader.text_encoder(plan) as (network, rows, blocks):
        _insert_measured_layers(network, found)
        for run in runs:
            for encoding in run.encodings.values():
                encode_tokens(network, rows, encoding.ids, dtype, blocks)
            yield


def _denoise(
    runs: Sequence[GenerationRun],
    found: Mapping[str, InputMoments],
    texts: Mapping[str, mx.array],
) -> Iterator[None]:
    """Make all steps of VIDEOS runs and the first of the others, with measured layers."""
    largest = max(runs, key=lambda run: run.plan.stage("denoise").peak)
    plan, loader = largest.plan.stage("denoise"), largest.loader
    with loader.stage(plan), loader.transformer(plan) as transformer:
        _insert_measured_layers(transformer[0], found)
        for number, run in enumerate(runs):
            plain = Accelerations({}, schedule_info(run.engine, run.settings, run.parallel))
            velocity = clip_guidance(run, clip_transformer(run, transformer, plain), texts)
            path = exact_path(run, velocity, transformer[0].config.in_channels)
            deque(islice(path, None if number < VIDEOS else 1), maxlen=0)
            yield


def _insert_measured_layers(network: nn.Module, found: Mapping[str, InputMoments]) -> None:
    layers = dict(network.named_modules())
    new = [(path, MeasuredLinear(layers[path], moments)) for path, moments in found.items()]
    network.update_modules(tree_unflatten(new))
