"""Leaps against On-device Sora: its own rule, fixed leaps, and both with merged tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.accel.lpl import FixedLeap, ReferenceLeap
from mlx_sora.accel.tdtm import PairedFrames
from mlx_sora.loading.checkpoint import load_weights
from mlx_sora.models.hooks import Hooks
from mlx_sora.models.stdit3 import KEYS, BlockPair, STDiT3, STDiT3Config
from mlx_sora.request.techniques import Lpl
from mlx_sora.sampling.base import LeapPolicy, Step, Velocity
from mlx_sora.sampling.guidance import Guidance
from mlx_sora.sampling.loop import StepResult, denoise
from mlx_sora.sampling.rflow import RFlow
from tests.helpers.golden import Case, channels_first, channels_last, drop_padding, relative_error
from tests.helpers.models import BoundModel
from tests.helpers.tolerance import rounding
from tests.parity.test_rflow import conditioning

TRAJECTORY = rounding(1e-3)
TIMES = 1e-3
COSINE = rounding(1e-5)


class Recorded(ReferenceLeap):
    """The reference's rule with the options of a case, and its state after each step."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.PATIENCE, self.TOLERANCE = options["tolerance"], options["cos_tolerance"]
        self.MINIMUM = options["minimum_steps"]
        self.best: list[float] = []
        self.left: list[int] = []
        super().__init__(Lpl("reference"), ScheduleInfo(options["num_sampling_steps"], 1, 1))

    def decide(self, step: Step, v: mx.array) -> bool:
        ready = super().decide(step, v)
        self.best.append(self.plateau.best)
        self.left.append(self.plateau.left)
        return ready


def times(case: Case, rounded: bool) -> tuple[RFlow, mx.array]:
    """The case's sampler and flow times."""
    options, call = case.config["rflow"], case.config["call"]
    sampler = RFlow(rounded, options["use_timestep_transform"])
    sizes = {name: call[name] for name in ("height", "width", "num_frames")}
    return sampler, sampler.timesteps(options["num_sampling_steps"], **sizes)


def check_decisions(case: Case, prefix: str, steps: list[StepResult], policy: Recorded) -> None:
    """Every number that the case holds about the rule's decisions under `prefix`."""
    expected = int(case[f"{prefix}leap_step"].item())
    leapt = [step.step.index for step in steps if step.is_leap]
    assert leapt == ([] if expected < 0 else [expected])
    seen = np.array([step.step.t for step in steps])[:, 0]
    assert np.abs(seen - np.array(case[f"{prefix}timesteps"])).max() <= TIMES
    cosines = np.array(policy.similarities) - np.array(case[f"{prefix}cos_mean_from_step1"])
    assert np.abs(cosines).max() <= COSINE
    # The reference forgets its state as it leaps.
    kept = len(steps) - len(leapt)
    best = np.array(policy.best[:kept]) - np.array(case[f"{prefix}best_cos_after_step"])[:kept]
    assert np.abs(best).max() <= COSINE
    assert policy.left[:kept] == case[f"{prefix}tolerance_after_step"].tolist()[:kept]
    assert not leapt or policy.left[-1] == 0


def follow(
    case: Case, velocity: Velocity, z: mx.array, policy: LeapPolicy | None, rounded: bool
) -> list[StepResult]:
    sampler, flow_times = times(case, rounded)
    given = conditioning(case)
    return list(denoise(velocity, z, flow_times, sampler, policy=policy, conditioning=given))


def check_fields(case: Case, start: str, fields: Callable[[str], Velocity]) -> None:
    """The reference's rule on every velocity field of a case, from latents `start`."""
    options = case.config["rflow"]
    assert case.config["cases"]
    for name in case.config["cases"]:
        policy = Recorded(options)
        z = channels_last(case[start])
        steps = follow(case, fields(name), z, policy, options["use_discrete_timesteps"])
        check_decisions(case, f"out.{name}.", steps, policy)
        final = channels_first(steps[-1].z)
        assert relative_error(final, case[f"out.{name}.final_z"]) <= TRAJECTORY, name


@pytest.mark.golden("lpl_synth")
def test_analytic_fields(case: Case) -> None:
    noise, target, direction = (
        channels_last(case[f"in.{name}"]) for name in ("noise", "target", "direction")
    )

    def fields(name: str) -> Velocity:
        shape = case.config["cases"][name]

        def velocity(z: mx.array, t: mx.array, step: Step, /) -> mx.array:
            tau = float(t[0].item()) / 1000.0
            wave = tau ** shape["p"] * np.cos(2 * np.pi * shape["freq"] * tau)
            return (target - noise) + shape["amp"] * float(wave) * direction

        return velocity

    check_fields(case, "in.noise", fields)


@pytest.mark.golden("lpl_script")
def test_scripted_similarities(case: Case) -> None:
    a, b = channels_last(case["in.a"]), channels_last(case["in.b"])

    def fields(name: str) -> Velocity:
        phi = case[f"in.{name}.phi"]

        def velocity(z: mx.array, t: mx.array, step: Step, /) -> mx.array:
            angle = phi[step.index]
            return mx.cos(angle) * a + mx.sin(angle) * b

        return velocity

    check_fields(case, "in.z_init", fields)


def guided_model(case: Case) -> Velocity:
    """The case's network under guidance, merging tokens in the steps that its constructor says."""
    constructor = case.config["constructor"]
    model = STDiT3(STDiT3Config.from_dict(constructor))
    load_weights(model, case.weights, KEYS)
    grid = case["in.z_init"].shape[2:]

    def hooks(step: int) -> Hooks[BlockPair] | None:
        merges = step < constructor["merge_steps"]
        return Hooks(token_merging=PairedFrames()) if merges else None

    bound = BoundModel(
        model,
        grid,
        hooks,
        height=float(case["in.height"][0].item()),
        width=float(case["in.width"][0].item()),
        fps=case["in.fps"],
    )
    text = drop_padding(case["in.y"].squeeze(1), case.get("in.text_mask"))
    return Guidance(bound, text, model.null_text, case.config["rflow"]["cfg_scale"])


@pytest.mark.golden("lpl_model", "lpl_tdtm_model")
def test_model(case: Case) -> None:
    options = case.config["rflow"]
    policy, z = Recorded(options), channels_last(case["in.z_init"])
    steps = follow(case, guided_model(case), z, policy, options["use_discrete_timesteps"])
    check_decisions(case, "out.", steps, policy)
    for index, step in enumerate(steps):
        z_in, v = case["out.z_before_step"][index], case["out.v_pred"][index]
        assert relative_error(channels_first(step.z_in), z_in) <= TRAJECTORY, index
        assert relative_error(channels_first(step.v), v) <= TRAJECTORY, index
    assert relative_error(channels_first(steps[-1].z), case["out.final_z"]) <= TRAJECTORY


def fixed_leap(after: int, steps: int) -> FixedLeap:
    return FixedLeap(Lpl(after=after), ScheduleInfo(steps, 1, 1))


@pytest.mark.golden("lpl_fixed")
@pytest.mark.parametrize("rounded", [True, False], ids=["rounded", "continuous"])
def test_fixed(case: Case, rounded: bool) -> None:
    prefix = "out.rounded." if rounded else "out.continuous."
    if f"{prefix}timesteps" not in case.tensors:
        pytest.skip("the case holds no such times")
    velocity, z = guided_model(case), channels_last(case["in.z_init"])
    total = case.config["rflow"]["num_sampling_steps"]
    assert case.config["targets"]
    for target in (None, *case.config["targets"]):
        policy = None if target is None else fixed_leap(target, total)
        steps = follow(case, velocity, z, policy, rounded)
        assert len(steps) == (total if target is None else target + 1)
        seen = np.array([step.step.t for step in steps])[:, 0]
        expected = np.array(case[f"{prefix}timesteps"])[: len(steps)]
        assert np.abs(seen - expected).max() <= TIMES
        final = case[f"{prefix}final_z.{'full' if target is None else f'n{target}'}"]
        assert relative_error(channels_first(steps[-1].z), final) <= TRAJECTORY, target
