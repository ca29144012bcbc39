"""What stays float32 in a bfloat16 run really does, and float16 is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from mlx_sora.errors import UsageError
from mlx_sora.models import ops, precision
from mlx_sora.models.hooks import Hooks, NoMerging
from mlx_sora.models.stdit3 import STDiT3, STDiT3Config
from mlx_sora.models.t5 import T5Config, T5Encoder

STDIT = STDiT3Config(hidden_size=32, num_heads=2, depth=1, caption_channels=8, model_max_length=4)
T5 = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)


def test_stream_and_modulation_of_a_bfloat16_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream into and out of each block is float32, what attends and is multiplied is not."""
    model = STDiT3(STDIT, mx.bfloat16)
    model.update(tree_map(lambda a: a.astype(mx.bfloat16), model.parameters()))
    streams: list[tuple[mx.Dtype, mx.Dtype]] = []
    attending: list[mx.Dtype] = []

    class Watched(NoMerging):
        def merge(self, x: mx.array) -> mx.array:
            attending.append(x.dtype)
            return x

    class Blocks:
        def get(self, index: int) -> Any:
            return tuple(
                self.watched(b) for b in (model.spatial_blocks[0], model.temporal_blocks[0])
            )

        def watched(self, block: Any) -> Any:
            class Wrapped:
                cross_attn = block.cross_attn

                def __call__(self, x: mx.array, modulation: mx.array, *rest: Any) -> mx.array:
                    streams.append((x.dtype, modulation.dtype))
                    out: mx.array = block(x, modulation, *rest)
                    streams.append((out.dtype, modulation.dtype))
                    return out

            return Wrapped()

        def release(self, index: int, output: mx.array) -> None:
            pass

    text = [mx.ones((3, 8), mx.bfloat16)]
    conditions = model.prepare(text, (2, 4, 4), height=32, width=32, fps=24)
    z = mx.ones((1, 2, 4, 4, 4), mx.bfloat16)
    out = model(z, mx.array([999.0]), conditions, hooks=Hooks(Blocks(), Watched()))
    assert streams == [(precision.RESIDUAL, precision.MODULATION)] * 4
    assert set(attending) == {mx.bfloat16}
    assert out.dtype == precision.RESIDUAL
    assert conditions.position.dtype == precision.TIMES


def test_activations_are_float32_inside() -> None:
    """In bfloat16 they are the float32 result, rounded once."""
    x = mx.linspace(-6, 6, 201).astype(mx.bfloat16)
    for activation in (ops.silu, ops.gelu_tanh):
        exact = activation(x.astype(mx.float32)).astype(mx.bfloat16)
        assert mx.array_equal(activation(x), exact)


def test_softmax_is_float32_inside() -> None:
    """600 equal logits: a running sum in bfloat16 would stop at 256."""
    q = mx.zeros((1, 1, 600, 4), mx.bfloat16)
    v = mx.ones((1, 1, 600, 4), mx.bfloat16)
    # MLX's own attention rounds the 600 weights to bfloat16.
    error = 2.0**-8 if ops.on_gpu() else 0.0
    assert float(mx.abs(ops.attention(q, q, v, 1.0) - v).max()) <= error


def test_times_are_told_apart() -> None:
    """bfloat16 has no numbers between 996 and 1000; the network still hears 998."""
    model = STDiT3(STDIT, mx.bfloat16)
    assert mx.array(998.0, mx.bfloat16).item() in (996.0, 1000.0)
    close, apart = (model.t_embedder(mx.array([t]), mx.bfloat16) for t in (998.0, 1000.0))
    assert not mx.array_equal(close, apart)


def test_t5_refuses_float16() -> None:
    encoder = T5Encoder(T5)
    with pytest.raises(UsageError, match="T5 cannot run in float16"):
        encoder(mx.zeros((1, 3, T5.d_model), mx.float16))


def test_networks_ask_the_policy() -> None:
    """No network decides by itself to widen a value; `ops` alone knows a float's bits."""
    folder = Path(precision.__file__).parent
    for file in folder.glob("*.py"):
        if file.name != "ops.py":
            assert "astype(mx.float" not in file.read_text(), file.name
