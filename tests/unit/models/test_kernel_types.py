"""Inputs of every kernel of a bfloat16 run on a GPU have the types of the table."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx import nn

from mlx_sora.loading.checkpoint import load_weights
from mlx_sora.loading.quantization import (
    NetworkQuantization,
    insert_quantized_layers,
    named_form,
)
from mlx_sora.models import ops, precision, stdit3, t5
from mlx_sora.models.key_map import KeyMap
from mlx_sora.models.stdit3 import STDiT3, STDiT3Config
from mlx_sora.models.t5 import T5Config, T5Encoder
from mlx_sora.models.vae import VAEConfig, VideoVAE
from tests.helpers.networks import leaves

DTYPE = mx.bfloat16
TEXT = T5Config(vocab_size=9, d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=2)
STDIT = STDiT3Config(
    hidden_size=64, num_heads=2, depth=1, caption_channels=8, model_max_length=4, mlp_ratio=1.0
)
VAE = VAEConfig.from_dict(
    {
        "spatial_config": {"block_out_channels": [8, 8], "layers_per_block": 1}
        | {"norm_num_groups": 4},
        "temporal_config": {"filters": 8, "num_res_blocks": 1, "channel_multipliers": [1, 2]}
        | {"temporal_downsample": [True], "num_groups": 4},
    }
)

Seen = dict[str, set[mx.Dtype]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Return a dict that receives the types of the floating inputs of each kernel."""
    kernels: Seen = {}

    def watch(owner: Any, function: str, name: str) -> None:
        plain = getattr(owner, function)

        def watched(*args: Any, **options: Any) -> Any:
            arrays = [a for a in (*args, options.get("mask")) if isinstance(a, mx.array)]
            kinds = {a.dtype for a in arrays if mx.issubdtype(a.dtype, mx.floating)}
            kernels.setdefault(name, set()).update(kinds)
            if "freqs" in options:
                kernels.setdefault("rope frequencies", set()).add(options["freqs"].dtype)
            return plain(*args, **options)

        monkeypatch.setattr(owner, function, watched)

    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    monkeypatch.setattr("mlx_sora.models.quantized.on_gpu", lambda: True, raising=False)
    for owner, function in ((mx, "addmm"), (mx, "matmul"), (mx.array, "__matmul__")):
        watch(owner, function, "matmul")
    for function in ("conv2d", "conv3d", "conv_general"):
        watch(mx, function, "convolution")
    watch(mx, "quantized_matmul", "quantized_matmul")
    watch(mx.fast, "scaled_dot_product_attention", "attention")
    for function in ("rope", "layer_norm", "rms_norm"):
        watch(mx.fast, function, function)
    return kernels


def loaded(network: nn.Module, keys: KeyMap, bits: int | None = None) -> Any:
    """The network with its weights loaded in the type of the run."""
    insert_quantized_layers(
        network, None if bits is None else NetworkQuantization(named_form(bits))
    )
    load_weights(network, leaves(network), keys, dtype=DTYPE)
    return network


def expected(network: str, bits: int | None = None) -> Seen:
    """The table of `network` for a run in bfloat16, with quantized layers or without."""
    table = precision.KERNEL_TYPES[network].items()
    return {
        name: {kind or DTYPE}
        for name, kind in table
        if name != "quantized_matmul" or bits is not None
    }


def test_text_encoder_without_products_that_are_not_quantized(seen: Seen) -> None:
    """All products of T5 are in its blocks."""
    encoder = loaded(T5Encoder(TEXT), t5.KEYS, bits=8)
    encoder(encoder.embed(mx.array([[1, 2, 3]])), mx.array([[1, 1, 0]]))
    assert seen == {n: kind for n, kind in expected("text_encoder", 8).items() if n != "matmul"}


def test_text_encoder(seen: Seen) -> None:
    encoder = loaded(T5Encoder(TEXT), t5.KEYS)
    encoder(encoder.embed(mx.array([[1, 2, 3]])), mx.array([[1, 1, 0]]))
    assert seen == expected("text_encoder")


def test_position_bias_is_cast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = loaded(T5Encoder(TEXT), t5.KEYS)
    seen: list[mx.Dtype] = []
    block = type(encoder.encoder.block[0])
    plain = block.__call__

    def watched(self: Any, x: mx.array, bias: mx.array) -> mx.array:
        seen.append(bias.dtype)
        out: mx.array = plain(self, x, bias)
        return out

    monkeypatch.setattr(block, "__call__", watched)
    encoder(encoder.embed(mx.array([[1, 2, 3]])), mx.array([[1, 1, 0]]))
    assert seen == [DTYPE] * TEXT.num_layers


@pytest.mark.parametrize("bits", [None, 8])
def test_transformer(seen: Seen, bits: int | None) -> None:
    model = loaded(STDiT3(STDIT, DTYPE), stdit3.KEYS, bits)
    text = [mx.ones((n, 8)) for n in (2, 3)]
    conditions = model.prepare(text, (2, 4, 4), height=32, width=32, fps=24)
    mask = mx.array([[True, False], [True, True]])
    z = mx.ones((2, 2, 4, 4, 4))
    out = model(z, mx.array([999.0, 999.0]), conditions, mask)
    assert seen == expected("transformer", bits)
    assert out.dtype == precision.RESIDUAL


def test_vae(seen: Seen) -> None:
    model = VideoVAE(VAE, dtype=DTYPE)
    model.spatial_vae.set_dtype(DTYPE)
    model.temporal_vae.set_dtype(DTYPE)
    z = model.encode(mx.zeros((1, 3, 8, 8, 3)))
    frames = model.decode(z, 3)
    assert seen == expected("vae")
    assert frames.dtype == z.dtype == precision.LATENTS
