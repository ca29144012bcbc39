"""T5 and STDiT in bfloat16 against the reference's float32: the policy of what stays float32 holds.

On CPU MLX multiplies bfloat16 by itself, slowly; the golden networks are small enough.
"""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sora.loading.checkpoint import load_weights
from mlx_sora.models import stdit3, t5
from tests.helpers.golden import Case, channels_first, channels_last
from tests.parity.test_stdit3 import prepare

#: Least cosine between bfloat16's result and the reference's.
ALIKE = 0.999


def cosine(a: mx.array, b: mx.array) -> float:
    a, b = a.astype(mx.float32).flatten(), b.astype(mx.float32).flatten()
    return float((a @ b) / mx.sqrt((a @ a) * (b @ b)))


@pytest.mark.golden("t5")
def test_t5(case: Case) -> None:
    encoder = t5.T5Encoder(t5.T5Config.from_dict(case.config["constructor"]))
    load_weights(encoder, case.weights, t5.KEYS, dtype=mx.bfloat16)
    out = encoder(encoder.embed(case["in.input_ids"]), case["in.attention_mask"])
    assert out.dtype == mx.bfloat16
    assert cosine(out, case["out.last_hidden_state"]) >= ALIKE


@pytest.mark.golden("stdit3")
def test_stdit3(case: Case) -> None:
    config = stdit3.STDiT3Config.from_dict(case.config["constructor"])
    model = stdit3.STDiT3(config, mx.bfloat16)
    load_weights(model, case.weights, stdit3.KEYS, dtype=mx.bfloat16)
    z, mask = channels_last(case["in.x"]), case.get("in.x_mask")
    out = model(z, case["in.timestep"], prepare(model, case), x_mask=mask)
    assert out.dtype == mx.float32
    assert cosine(channels_first(out), case["out.output"]) >= ALIKE
