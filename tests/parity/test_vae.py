"""The VAEs against the reference: spatial, temporal, and the pipeline of both."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sora.loading.checkpoint import load_weights
from mlx_sora.models import vae_spatial, vae_temporal
from mlx_sora.models.vae import EncodeNoise, Posterior, VAEConfig, VideoVAE, key_map
from mlx_sora.models.vae_spatial import SpatialVAE, SpatialVAEConfig
from mlx_sora.models.vae_temporal import TemporalVAE, TemporalVAEConfig
from tests.helpers.golden import Case, channels_first, channels_last, relative_error
from tests.helpers.tolerance import rounding

#: Largest error of one network pass, in standard deviations of the reference's output.
TOLERANCE = rounding(1e-4)


def frames_of(case: Case, pattern: str) -> list[int]:
    """Frame counts n for which the case holds an input named `pattern` with n filled in."""
    before, after = pattern.split("#")
    names = (name for name in case.tensors if name.startswith(before) and name.endswith(after))
    counts = sorted(int(name[len(before) : len(name) - len(after)]) for name in names)
    assert counts, f"{case.name} has no {pattern}"
    return counts


def expect(case: Case, name: str, actual: mx.array) -> None:
    """Compare a channels-last result with the reference's output `name`."""
    error = relative_error(channels_first(actual), case[f"out.{name}"])
    assert error <= TOLERANCE, f"{name}: {error:.2e}"


def expect_posterior(case: Case, prefix: str, moments: mx.array) -> None:
    """Compare mean, log-variance and the sample drawn with the case's noise."""
    posterior = Posterior.from_moments(moments)
    expect(case, f"{prefix}mean", posterior.mean)
    expect(case, f"{prefix}logvar", posterior.logvar)
    noise = channels_last(case[f"in.{prefix}noise"])
    expect(case, f"{prefix}sample", posterior.sample(noise))


def video_vae(case: Case, dtype: mx.Dtype = mx.float32) -> VideoVAE:
    values = dict(case.config["constructor"])
    values["spatial_config"] = values.pop("spatial")
    values["temporal_config"] = values.pop("temporal")
    halves = {"encoder": "encoder.", "decoder": "decoder."}
    parts = [p for p, name in halves.items() if any(f".{name}" in key for key in case.weights)]
    vae = VideoVAE(VAEConfig.from_dict(values), parts, dtype)
    load_weights(vae, case.weights, key_map(parts), dtype=dtype)
    return vae


@pytest.mark.golden("vae_spatial")
def test_spatial(case: Case) -> None:
    vae = SpatialVAE(SpatialVAEConfig.from_dict(case.config["constructor"]))
    load_weights(vae, case.weights, vae_spatial.KEYS)
    moments = vae.encode(channels_last(case["in.x"]))
    expect(case, "moments", moments)
    expect_posterior(case, "", moments)
    expect(case, "decoded", vae.decode(channels_last(case["in.z"])))


@pytest.mark.golden("vae_temporal")
def test_temporal_encode(case: Case) -> None:
    vae = TemporalVAE(TemporalVAEConfig.from_dict(case.config["constructor"]))
    load_weights(vae, case.weights, vae_temporal.KEYS)
    for frames in frames_of(case, "in.enc#.x"):
        moments = vae.encode(channels_last(case[f"in.enc{frames}.x"]))
        expect_posterior(case, f"enc{frames}.", moments)


@pytest.mark.golden("vae_temporal")
def test_temporal_decode(case: Case) -> None:
    vae = TemporalVAE(TemporalVAEConfig.from_dict(case.config["constructor"]))
    load_weights(vae, case.weights, vae_temporal.KEYS)
    for frames in frames_of(case, "in.dec#.z"):
        z = channels_last(case[f"in.dec{frames}.z"])
        assert z.shape[1] == vae.config.latent_frames(frames)
        expect(case, f"dec{frames}.x", vae.decode(z, frames))


@pytest.mark.golden("vae_pipeline_decode")
def test_pipeline_decode(case: Case) -> None:
    vae = video_vae(case)
    for frames in frames_of(case, "in.f#.z"):
        z = channels_last(case[f"in.f{frames}.z"])
        assert z.shape[1] == vae.latent_frames(frames)
        expect(case, f"f{frames}.x", vae.decode(z, frames))


@pytest.mark.golden("vae_pipeline_encode")
def test_pipeline_encode(case: Case) -> None:
    vae = video_vae(case)
    for frames in frames_of(case, "in.f#.x"):
        noise = EncodeNoise(
            spatial=channels_last(case[f"in.f{frames}.noise_spatial"]),
            temporal=channels_last(case[f"in.f{frames}.noise_temporal"]),
        )
        z = vae.encode(channels_last(case[f"in.f{frames}.x"]), noise)
        expect(case, f"f{frames}.z", z)
