"""Parts of the networks at their full width, with random weights, and a video of the bundled model.

A part whose share of the published size would be a few tokens or rows is built narrower instead.
Dimension letters: B batch, T frames, H height, W width, S tokens per frame, C channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_sora.errors import WeightsError
from mlx_sora.loading.model_folder import BUNDLED
from mlx_sora.manage.machine_check import (
    OK,
    SKIPPED,
    WRONG,
    Allowance,
    Case,
    CheckResult,
    Form,
    device_under_test,
    failed_result,
    reference_device,
    type_advice,
)
from mlx_sora.manage.machine_forms import (
    FRAMES,
    LATENT_HEIGHT,
    LATENT_WIDTH,
    TEXT_TOKENS,
    TOKENS,
    normals,
    part,
)
from mlx_sora.models import stdit3, t5, vae_spatial, vae_temporal
from mlx_sora.models.hooks import NoMerging
from mlx_sora.pipeline import Pipeline
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.device import backend

#: Below this share of the published size, parts are this many times narrower.
_FULL_WIDTH, _NARROWER = 1e-3, 8


def network_case(
    network: nn.Module,
    call: Callable[..., mx.array],
    inputs: Sequence[mx.array],
    constants: Sequence[mx.array] = (),
) -> Case:
    """Return the case call(*inputs, *constants) of a network with random weights.

    Weights keep the size of activations; norms multiply by about 1.
    """
    parameters = dict(tree_flatten(network.parameters()))
    paths = list(parameters)

    def scaled(path: str, value: mx.array) -> mx.array:
        if value.ndim > 1:
            return value * math.sqrt(value.shape[-2] / value.size)
        return value / 8 + float("norm" in path and path.endswith("weight"))

    numbers = normals(*[value.shape for value in parameters.values()])
    weights = [scaled(path, value) for path, value in zip(paths, numbers, strict=True)]

    def run(*arrays: mx.array) -> mx.array:
        network.update(tree_unflatten(list(zip(paths, arrays, strict=False))))
        return call(*arrays[len(paths) :])

    return Case(run, [*weights, *inputs], constants)


def _divisor(scale: float) -> int:
    return 1 if scale >= _FULL_WIDTH else _NARROWER


def block_pair(scale: float) -> Case:
    """Run a spatial and a temporal block of STDiT3 with a masked text."""
    config = stdit3.STDiT3Config(
        hidden_size=1152 // _divisor(scale), num_heads=16 // _divisor(scale)
    )
    frames = part(FRAMES, scale, 2)
    tokens = part(TOKENS, scale * FRAMES / frames, 8)
    width = config.hidden_size
    pair = nn.Module()
    pair.spatial = stdit3.STDiT3Block(config, temporal=False)
    pair.temporal = stdit3.STDiT3Block(config, temporal=True)
    text, x, modulation = normals(
        (1, TEXT_TOKENS, width), (1, frames, tokens, width), (1, 1, 6, width)
    )
    mask = mx.arange(TEXT_TOKENS)[None, None, None] < 220

    def call(text: mx.array, x: mx.array, modulation: mx.array, mask: mx.array) -> mx.array:
        rope, merging = stdit3.Rope(config.head_dim), partial(NoMerging().at, 0)
        for block in (pair.spatial, pair.temporal):
            block.dtype = text.dtype
            keys_values = block.cross_attn.keys_values(text)
            x = block(x, modulation, keys_values, mask, rope, merging)
        return x

    return network_case(pair, call, [text], [x, modulation, mask])


def text_block(scale: float) -> Case:
    """Run a block of T5 with padding at the end."""
    divisor = _divisor(scale)
    config = t5.T5Config(d_model=4096 // divisor, d_ff=10240 // divisor, num_heads=64 // divisor)
    block = t5.T5Block(config, has_bias=True)
    length = part(TEXT_TOKENS, scale, 8)
    valid = mx.arange(length) < length - length // 3

    def call(x: mx.array, valid: mx.array) -> mx.array:
        bias = mx.where(valid, block.position_bias(length), t5.MASKED)
        return block(x, bias)

    return network_case(block, call, normals((1, length, config.d_model)), [valid])


def image_level(scale: float) -> Case:
    """Run a level of the spatial VAE's decoder: 512 to 256 channels, then twice the size."""
    divisor = _divisor(scale)
    block = vae_spatial.UpBlock(512 // divisor, 256 // divisor, 3, 32, last=False)
    shape = (1, part(4 * LATENT_HEIGHT, scale, 4), 4 * LATENT_WIDTH, 512 // divisor)
    return network_case(block, block, normals(shape))


def image_middle(scale: float) -> Case:
    """Run the middle of the spatial VAE's decoder, with attention over a frame."""
    channels = 512 // _divisor(scale)
    block = vae_spatial.MidBlock(channels, 32)
    shape = (1, part(LATENT_HEIGHT, scale, 4), LATENT_WIDTH, channels)
    return network_case(block, block, normals(shape))


def time_level(scale: float) -> Case:
    """Run a block of the temporal VAE's decoder: 512 to 256 channels over ten frames."""
    divisor = _divisor(scale)
    block = vae_temporal.ResBlock(512 // divisor, 256 // divisor, 32)
    shape = (1, 10, part(LATENT_HEIGHT, scale, 4), LATENT_WIDTH, 512 // divisor)
    return network_case(block, block, normals(shape))


_part = partial(Form, float32=1000, half=4)
_vae_part = partial(_part, advice=partial(type_advice, option="--vae-dtype"))

NETWORKS = (
    _part("STDiT3 block pair", block_pair, 500, 3),
    _part("T5 block", text_block, 117, 3, types=(mx.float32, mx.bfloat16)),
    _vae_part("VAE level, spatial", image_level, 330, 2),
    _vae_part("VAE middle, spatial", image_middle, 35, 0.5),
    _vae_part("VAE level, temporal", time_level, 170, 2),
)

#: Types of the transformer and of the VAE in which a video is made on a GPU, and the largest error
#: of its frames in levels of 255, root mean square.
_VIDEOS = {
    ("float32", "float32"): 0.05,
    ("bfloat16", "float32"): 1.0,
    ("float16", "float32"): 1.0,
    ("bfloat16", "bfloat16"): 1.5,
}


def check_video(allowance: Allowance) -> Iterator[CheckResult]:
    """Make a video of the bundled model in each type and compare its frames."""
    videos = list(_VIDEOS)[: 1 if backend() == "cpu" else None]
    try:
        with reference_device():
            expected = _frames("float32", "float32")
        for types in videos:
            yield _compare_video(types, expected)
    except WeightsError as error:
        yield CheckResult("whole video", SKIPPED, f"the bundled model is missing: {error.message}")


def _compare_video(types: tuple[str, str], expected: Any) -> CheckResult:
    import numpy as np

    dtype, vae_dtype = types
    name, bound = f"whole video, {dtype}, VAE in {vae_dtype}", _VIDEOS[types]
    start = time.perf_counter()
    try:
        with device_under_test():
            frames = _frames(dtype, vae_dtype)
    except Exception as caught:  # whatever it is, it is a result
        return failed_result(name, caught)
    seconds = time.perf_counter() - start
    error = float(np.sqrt(np.square(np.subtract(frames, expected, dtype=np.float32)).mean()))
    message = f"differs by {error:.2g} of 255 levels, at most {bound:.2g} expected"
    if error <= bound:
        return CheckResult(name, OK, message, error, bound, seconds)
    advice = type_advice(getattr(mx, dtype))
    if vae_dtype != "float32":
        advice = type_advice(getattr(mx, vae_dtype), "--vae-dtype")
    return CheckResult(name, WRONG, message, error, bound, seconds, advice)


def _frames(dtype: str, vae_dtype: str) -> Any:
    pipeline = Pipeline.from_pretrained(BUNDLED, dtype=dtype)
    request = GenerationRequest("a red circle", seed=1, text_cache=False, vae_dtype=vae_dtype)
    return pipeline(request).frames
