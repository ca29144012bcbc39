"""Rectified flow against the reference: schedules, noise, and whole runs, step by step."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora.loading.checkpoint import load_weights
from mlx_sora.models.stdit3 import KEYS, STDiT3, STDiT3Config
from mlx_sora.sampling.guidance import Guidance
from mlx_sora.sampling.loop import Conditioning, StepResult, denoise
from mlx_sora.sampling.rflow import RFlow, add_noise
from tests.helpers.golden import Case, channels_first, channels_last, drop_padding, relative_error
from tests.helpers.models import BoundModel
from tests.helpers.tolerance import rounding

TRAJECTORY = rounding(1e-3)
NETWORK = rounding(1e-4)
TIMES = 1e-3


@pytest.mark.golden("rflow_timesteps")
def test_timesteps(case: Case) -> None:
    assert case.config["rows"]
    for row in case.config["rows"]:
        sampler = RFlow(
            use_discrete_timesteps=row["use_discrete_timesteps"],
            use_timestep_transform=row["use_timestep_transform"],
            dtype=getattr(mx, row["args_dtype"]),
        )
        times = sampler.timesteps(
            row["steps"],
            height=row["height"],
            width=row["width"],
            num_frames=row["num_frames"],
        )
        assert times.shape == (row["steps"] + 1, 1)
        expected = np.array([*row["timesteps"], 0.0])
        assert np.abs(np.array(times)[:, 0] - expected).max() <= TIMES, row["size"]


@pytest.mark.golden("rflow_add_noise")
def test_add_noise(case: Case) -> None:
    noisy = add_noise(case["in.original"], case["in.noise"], case["in.timesteps"])
    assert relative_error(noisy, case["out.noisy"]) <= rounding(1e-6)


def schedule(case: Case) -> tuple[RFlow, mx.array]:
    """The case's sampler and its flow times."""
    options: dict[str, Any] = case.config["rflow"]
    sampler = RFlow(
        use_discrete_timesteps=options["use_discrete_timesteps"],
        use_timestep_transform=options["use_timestep_transform"],
    )
    times = sampler.timesteps(
        options["num_sampling_steps"],
        height=case["in.height"],
        width=case["in.width"],
        num_frames=case["in.num_frames"],
    )
    return sampler, times


def conditioning(case: Case) -> Conditioning | None:
    """The case's frame mask, with the reference's draws (one per step, in order)."""
    mask = case.get("in.mask")
    if mask is None:
        return None
    return Conditioning(mask, lambda index: channels_last(case["in.randn_like"][index]))


def sample(case: Case, *, sequential: bool) -> tuple[list[StepResult], list[mx.array | None]]:
    """All steps of the case's run, and the frame mask of each call of the network."""
    model = STDiT3(STDiT3Config.from_dict(case.config["constructor"]))
    load_weights(model, case.weights, KEYS)
    bound = BoundModel(
        model,
        case["in.z_init"].shape[2:],
        height=float(case["in.height"][0]),
        width=float(case["in.width"][0]),
        fps=case["in.fps"],
    )
    text = drop_padding(case["in.y"].squeeze(1), case.get("in.text_mask"))
    scale = case.config["rflow"]["cfg_scale"]
    velocity = Guidance(bound, text, model.null_text, scale, sequential=sequential)
    sampler, times = schedule(case)
    z = channels_last(case["in.z_init"])
    return list(denoise(velocity, z, times, sampler, conditioning=conditioning(case))), bound.masks


@pytest.mark.golden("rflow_sample")
@pytest.mark.parametrize("sequential", [False, True], ids=["batched", "sequential"])
def test_run(case: Case, sequential: bool) -> None:
    results, masks = sample(case, sequential=sequential)
    assert len(results) == case["out.timesteps"].shape[0]
    for index, result in enumerate(results):
        times = mx.abs(result.step.t - case["out.timesteps"][index])
        assert float(times.max()) <= TIMES
        z_in, v = case["out.z_model_input"][index], case["out.v_pred"][index]
        assert relative_error(channels_first(result.z_in), z_in) <= TRAJECTORY, index
        assert relative_error(channels_first(result.v), v) <= TRAJECTORY, index
    assert relative_error(channels_first(results[-1].z), case["out.final_z"]) <= TRAJECTORY
    if "out.x_mask" in case.tensors:
        halves = mx.stack([mask for mask in masks if mask is not None])
        expected = case["out.x_mask"].reshape(halves.shape)
        assert mx.array_equal(halves.astype(mx.int32), expected)
    else:
        assert masks == [None] * len(masks)


@pytest.mark.golden("rflow_sample")
def test_first_velocity_has_a_networks_accuracy(case: Case) -> None:
    """Before errors build up, one guided pass is as close as any network pass."""
    results, _ = sample(case, sequential=False)
    first = relative_error(channels_first(results[0].v), case["out.v_pred"][0])
    assert first <= NETWORK
