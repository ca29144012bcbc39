"""Sensitivity of a model's layers to quantization, measured on the model itself.

One layer at a time is rounded to PROBE_BITS. Its error is that of the last latents of a few
prompts. At other widths, it is taken to grow with the squared error of the weights, which is
measured for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx
from mlx import nn

from mlx_sora import __version__
from mlx_sora.accel import Accelerations
from mlx_sora.errors import UsageError
from mlx_sora.loading.quantization import NetworkQuantization, named_form, quantizable_linears
from mlx_sora.loading.quantization_choice import Sensitivities, stored_quantization, weights_hash
from mlx_sora.models.quantized import Quantization
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.generate import prepare, schedule_info
from mlx_sora.pipeline.locks import model_lock
from mlx_sora.pipeline.networks import StreamedTransformer
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.pipeline.stages import clip_guidance, clip_transformer, encode_text
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.request.options import WIDTHS
from mlx_sora.sampling import SAMPLERS
from mlx_sora.sampling.loop import denoise
from mlx_sora.sampling.noise import Noise
from mlx_sora.text.encoder import encode_tokens

#: Width at which the error of the latents is measured.
PROBE_BITS = 4

#: A part of the model and a layer of it.
Layer = tuple[str, str]


def measure_sensitivities(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    on_progress: Callable[[int], None] = lambda done: None,
) -> Sensitivities:
    """Return the sensitivities of all layers, as means over `requests`.

    The networks are held whole in memory, one after the other. on_progress: called with the number
    of finished prompts. Raises UsageError for a quantized model.
    """
    if stored_quantization(engine.model):
        raise UsageError(
            f"{engine.model.name} is quantized already.", "Give the model that it came from."
        )
    totals: dict[Layer, float] = {}
    growth: dict[Layer, dict[int, float]] = {}
    with model_lock(engine.model.path):
        for done, request in enumerate(requests, start=1):
            run = prepare(engine, replace(request.with_seed(), memory_budget="off"))
            for layer, error in _measure(run, growth):
                totals[layer] = totals.get(layer, 0.0) + error / len(requests)
            on_progress(done)
    layers: dict[str, dict[str, dict[str, float]]] = {"text_encoder": {}, "transformer": {}}
    for (part, path), error in totals.items():
        curve = growth[part, path]
        layers[part][path] = {str(n): float(f"{error * g:.4g}") for n, g in curve.items()}
    about = {"prompts": len(requests), "steps": run.settings.steps, "mlx_sora": __version__}
    return Sensitivities(weights_hash(engine.model), layers, about)


def _measure(
    run: GenerationRun, growth: dict[Layer, dict[int, float]]
) -> Iterator[tuple[Layer, float]]:
    """Yield each layer and its error on one prompt; add how errors grow with fewer bits."""
    texts: dict[str, mx.array] = {}
    for _ in encode_text([run], texts, run.ranks):
        pass
    variants = dict(_rounded_texts(run, growth))
    plan = run.plan.stage("denoise")
    with run.loader.stage(plan), run.loader.transformer(plan) as transformer:
        exact = _latents(run, transformer, texts)
        for path, states in variants.items():
            found = _latents(run, transformer, {**texts, **states})
            yield ("text_encoder", path), _squares(found - exact) / _squares(exact)
        for path, layer in _linears(transformer[0]).items():
            with _rounded(layer, growth.setdefault(("transformer", path), {})):
                found = _latents(run, transformer, texts)
            yield ("transformer", path), _squares(found - exact) / _squares(exact)


def _rounded_texts(
    run: GenerationRun, growth: dict[Layer, dict[int, float]]
) -> Iterator[tuple[str, Mapping[str, mx.array]]]:
    """Yield each layer of T5 and the states of all texts with that layer rounded."""
    plan, dtype = run.plan.stage("encode"), run.engine.precision.text_encoder
    with run.loader.stage(plan), run.loader.text_encoder(plan) as (network, rows, _):
        for path, layer in _linears(network).items():
            with _rounded(layer, growth.setdefault(("text_encoder", path), {})):
                yield (
                    path,
                    {
                        text: encode_tokens(network, rows, encoding.ids, dtype)
                        for text, encoding in run.encodings.items()
                    },
                )


def _linears(network: nn.Module) -> dict[str, nn.Linear]:
    found = quantizable_linears(network, NetworkQuantization(named_form(PROBE_BITS)))
    return {path: layer for path, (layer, _) in found.items()}


@contextmanager
def _rounded(layer: nn.Linear, growth: dict[int, float]) -> Iterator[None]:
    """Round the weight of `layer` to PROBE_BITS inside the block.

    growth: gets, once, the squared error of the weight at each width relative to that.
    """
    weight = layer.weight
    layer.weight = _round(weight, named_form(PROBE_BITS))
    if not growth:
        errors = {n: _squares(_round(weight, named_form(n)) - weight) for n in WIDTHS}
        growth |= {n: error / (errors[PROBE_BITS] or 1.0) for n, error in errors.items()}
    try:
        yield
    finally:
        layer.weight = weight


def _round(weight: mx.array, form: Quantization) -> mx.array:
    return form.rotate(form.dequantize(form.quantize(weight), mx.float32)).astype(weight.dtype)


def _latents(
    run: GenerationRun, transformer: StreamedTransformer, texts: Mapping[str, mx.array]
) -> mx.array:
    """Return the last latents of a run under `texts`."""
    settings, sampler = run.settings, SAMPLERS["rflow"]
    plain = Accelerations({}, schedule_info(run.engine, run.settings, run.parallel))
    # A new one each time: it holds keys and values of the text.
    velocity = clip_guidance(run, clip_transformer(run, transformer, plain), texts)
    times = sampler.timesteps(settings.steps, **settings.model_args.sizes)
    noise = Noise([settings.seed], (*settings.geometry.latent, transformer[0].config.in_channels))
    *_, last = denoise(velocity, noise.initial(), times, sampler)
    return last.z


def _squares(x: mx.array) -> float:
    return float(mx.square(x.astype(mx.float32)).sum().item())  # type: ignore[arg-type]
