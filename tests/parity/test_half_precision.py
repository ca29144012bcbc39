"""Networks in half precision against the reference's float32: what has to stay float32 does.

On CPU MLX multiplies half precision by itself, slowly; the golden networks are small enough.
"""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sora.loading.checkpoint import load_weights
from mlx_sora.models import ops, stdit3, t5
from tests.helpers.golden import Case, channels_first, channels_last
from tests.parity.test_stdit3 import prepare
from tests.parity.test_vae import frames_of, video_vae

#: Least cosine between the result in half precision and the reference's.
ALIKE = 0.999

HALVES = [mx.bfloat16, mx.float16]

#: The same for the VAE, which has fewer layers.
VAE_HALVES = [(mx.bfloat16, 0.999), (mx.float16, 0.9999)]


@pytest.fixture(params=["CPU forms", "GPU forms"])
def forms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "on_gpu", lambda: request.param == "GPU forms")


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


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.golden("stdit3")
def test_stdit3(case: Case, dtype: mx.Dtype) -> None:
    config = stdit3.STDiT3Config.from_dict(case.config["constructor"])
    model = stdit3.STDiT3(config, dtype)
    load_weights(model, case.weights, stdit3.KEYS, dtype=dtype)
    z, mask = channels_last(case["in.x"]), case.get("in.x_mask")
    out = model(z, case["in.timestep"], prepare(model, case), x_mask=mask)
    assert out.dtype == mx.float32
    assert cosine(channels_first(out), case["out.output"]) >= ALIKE


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize(("dtype", "alike"), VAE_HALVES)
@pytest.mark.golden("vae_pipeline_decode")
def test_vae_decodes(case: Case, dtype: mx.Dtype, alike: float) -> None:
    vae = video_vae(case, dtype)
    for frames in frames_of(case, "in.f#.z"):
        out = vae.decode(channels_last(case[f"in.f{frames}.z"]), frames)
        assert out.dtype == mx.float32
        assert cosine(channels_first(out), case[f"out.f{frames}.x"]) >= alike


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize(("dtype", "alike"), VAE_HALVES)
@pytest.mark.golden("vae_pipeline_encode")
def test_vae_encodes(case: Case, dtype: mx.Dtype, alike: float) -> None:
    half, full = video_vae(case, dtype), video_vae(case)
    for frames in frames_of(case, "in.f#.x"):
        x = channels_last(case[f"in.f{frames}.x"])
        assert cosine(half.encode(x), full.encode(x)) >= alike
