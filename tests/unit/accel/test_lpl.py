"""Leaps: the step that each rule chooses, with masks, batches and every sampler; its account."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora.accel import lpl
from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.accel.lpl import Leap, ReferenceLeap, make_leap
from mlx_sora.request.techniques import Lpl
from mlx_sora.sampling import SAMPLERS
from mlx_sora.sampling.base import Step
from mlx_sora.sampling.loop import Conditioning, StepResult, denoise
from mlx_sora.sampling.noise import Noise
from mlx_sora.sampling.rflow import RFlow
from tests.helpers.flows import Curved, Straight, latents, times
from tests.helpers.tolerance import rounding

SHAPE = (1, 3, 4, 4, 4)


def rule(text: str, steps: int = 8, evaluations: int = 1) -> Leap:
    """Return the leap of --lpl `text` in a run of `steps` steps."""
    return make_leap(Lpl.parse(text), ScheduleInfo(steps, evaluations, 3))


class EarlyReferenceLeap(ReferenceLeap):
    """The reference's rule, counting from the first step on."""

    MINIMUM = 0


def leap_of(results: Sequence[StepResult]) -> int | None:
    """Return the index of the step that was the leap."""
    assert not any(result.is_leap for result in results[:-1])
    return results[-1].step.index if results[-1].is_leap else None


@dataclass
class Turning:
    """Velocities of every sample turned by phi[step, sample] in the plane of two latents.

    noisy: frames whose velocity is random instead.
    """

    phi: np.ndarray
    noisy: tuple[int, ...] = ()

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        angle = mx.array(self.phi[step.index], mx.float32).reshape(-1, 1, 1, 1, 1)
        a = mx.zeros(z.shape)
        a[..., 0] = 1.0
        b = mx.zeros(z.shape)
        b[..., 1] = 1.0
        v = mx.cos(angle) * a + mx.sin(angle) * b
        if self.noisy:
            noise = 9 * mx.random.normal(z.shape, key=mx.random.key(step.index))
            v[:, list(self.noisy)] = noise[:, list(self.noisy)]
        return v


def turning(cosines: np.ndarray) -> Turning:
    """Return velocities whose successive cosines are `cosines` [steps - 1, B]."""
    angles = np.arccos(np.clip(cosines, -1, 1))
    return Turning(np.concatenate([np.zeros((1, angles.shape[1])), np.cumsum(angles, axis=0)]))


def run(
    flow: Turning, leap: str | Leap, steps: int, given: Conditioning | None = None
) -> list[StepResult]:
    z = mx.zeros((flow.phi.shape[1], *SHAPE[1:]))
    policy = rule(leap, steps) if isinstance(leap, str) else leap
    return list(denoise(flow, z, times(steps), RFlow(), policy=policy, conditioning=given))


def by_the_text(cosines: Sequence[float], text: str, steps: int) -> int | None:
    """Return the leap of the paper's rule for one sample. cosines[k - 1] is that of step k."""
    config = Lpl.parse(text)
    best, failures = -math.inf, 0
    for index in range(1, steps):
        if index + 1 < config.minimum * steps:
            continue
        if cosines[index - 1] > best + config.tolerance:
            best, failures = cosines[index - 1], 0
        else:
            failures += 1
        if failures == config.patience:
            return index
    return None


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, 1, 5, 7])
def test_fixed_rule_leaps_after_its_steps(name: str, steps: int) -> None:
    flow, sampler = Curved(), SAMPLERS[name]
    results = list(denoise(flow, latents(), times(8), sampler, policy=rule(f"fixed:{steps}")))
    plain = list(denoise(Curved(), latents(), times(8), sampler))
    assert leap_of(results) == steps
    assert flow.calls == steps * sampler.evaluations + 1
    for leaping, ordinary in zip(results[:-1], plain, strict=False):
        assert mx.array_equal(leaping.z, ordinary.z)
    last = results[-1]
    assert mx.allclose(last.z, last.z_in + last.v * last.t / 1000, rtol=0, atol=rounding(1e-6))


def test_fixed_rule_beyond_the_end_never_leaps() -> None:
    results = list(denoise(Curved(), latents(), times(8), RFlow(), policy=rule("fixed:8")))
    plain = list(denoise(Curved(), latents(), times(8), RFlow()))
    assert leap_of(results) is None
    assert mx.array_equal(results[-1].z, plain[-1].z)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [10, 30])
@pytest.mark.parametrize("frames", [17, 102])
def test_timed_rule_leaps_at_its_time_on_every_schedule(name: str, steps: int, frames: int) -> None:
    schedule = SAMPLERS[name].timesteps(steps, height=720, width=1280, num_frames=frames)
    flow = Straight(latents(1))
    *_, last = denoise(flow, latents(), schedule, SAMPLERS[name], policy=rule("t:660"))
    assert last.is_leap
    assert last.t <= 660 < float(schedule[last.step.index - 1, 0])
    assert mx.allclose(last.z, flow.end, rtol=0, atol=rounding(1e-5))


def test_timed_rule_waits_for_all_samples() -> None:
    own = mx.array([[1000.0, 1000.0], [600.0, 900.0], [300.0, 700.0], [100.0, 400.0], [0.0, 0.0]])
    results = list(denoise(Curved(), latents(), own, RFlow(), policy=rule("t:700")))
    assert leap_of(results) == 2


RULES = (
    "adaptive",
    "adaptive:patience=1",
    "adaptive:patience=5,tolerance=0.01",
    "adaptive:minimum=0",
    "adaptive:minimum=0.9,patience=2",
    "adaptive:tolerance=0,minimum=0.34",
)


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize("seed", range(6))
def test_adaptive_rule_is_the_text_of_the_paper(text: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rising = np.linspace(0.6, 0.95, 19) if seed % 2 else 0.8
    cosines = rising + 0.04 * rng.uniform(-1, 1, 19)
    results = run(turning(cosines[:, None]), text, 20)
    assert leap_of(results) == by_the_text(cosines.tolist(), text, 20)


@pytest.mark.parametrize("text", [*RULES, "fixed:3", "reference", "reference from the first step"])
def test_rules_never_leap_before_the_earliest_step(text: str) -> None:
    """With velocities that never change, the adaptive rules leap in the earliest step."""
    for steps in (1, 2, 7, 20, 30):
        if text.endswith("first step"):
            leap: Leap = EarlyReferenceLeap(Lpl("reference"), ScheduleInfo(steps, 1, 3))
        else:
            leap = rule(text, steps)
        index, earliest = leap_of(run(turning(np.ones((steps - 1, 1))), leap, steps)), leap.earliest
        if isinstance(leap, ReferenceLeap):
            earliest += 1  # its first cosine is better than the 0 it begins with
        assert index == (earliest if earliest < steps else None)


def test_adaptive_rule_waits_for_rising_similarity() -> None:
    cosines = np.linspace(0.5, 0.99, 29)[:, None]
    assert leap_of(run(turning(cosines), "adaptive", 30)) is None
    assert leap_of(run(turning(cosines), "adaptive:tolerance=0.1", 30)) is not None


def test_adaptive_rule_sees_the_whole_tensor() -> None:
    """The reference sees one frame of one channel, which alone is steady here."""
    rng = np.random.default_rng(1)
    angles = np.arccos(np.linspace(0.3, 0.999, 29))

    def velocity(z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        angle = float(angles[: step.index].sum())
        v = mx.zeros(z.shape)
        v[:, 1:, ..., 0], v[:, 1:, ..., 1] = math.cos(angle), math.sin(angle)
        v[:, 0, ..., 0] = 1e-3
        return v

    z = mx.array(rng.standard_normal(SHAPE), mx.float32)
    for text, leap in (("adaptive", None), ("reference", 17)):
        results = list(denoise(velocity, z, times(30), RFlow(), policy=rule(text, 30)))
        assert leap_of(results) == leap


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("text", ["fixed:5", "t:400", "adaptive:patience=1,tolerance=2"])
def test_order_1_adds_the_change_of_the_velocity(name: str, text: str) -> None:
    """A curved flow ends nearer to its end, and each sample goes by its own times."""
    own = mx.stack([times(8)[:, 0], 800 / 1000 * times(8)[:, 0]], axis=1)
    order = f"{text},order=1"
    runs = [
        list(denoise(Curved(), latents(), own, SAMPLERS[name], policy=rule(each)))
        for each in (text, order)
    ]
    assert leap_of(runs[0]) == leap_of(runs[1]) in (4, 5)
    (*_, before, last), straight = runs[1], runs[0][-1]
    for sample, (t, earlier) in enumerate(np.array(mx.stack([last.step.t, before.step.t]).T)):
        t, earlier = t / 1000, earlier / 1000
        bend = (straight.v - before.v)[sample] / (earlier - t)
        v = straight.v[sample] + bend * t / 2 * (1 - t)
        for found, expected in ((last.v, v), (last.z, last.z_in[sample] + v * t)):
            assert mx.allclose(found[sample], expected, rtol=0, atol=rounding(1e-5))
    end = list(denoise(Curved(), latents(), own, SAMPLERS["midpoint"]))[-1].z
    errors = [float(mx.abs(leap.z - end).max()) for leap in (straight, last)]
    assert errors[1] < 0.7 * errors[0]


def test_order_1_needs_two_velocities_of_a_moving_frame() -> None:
    """A frame that begins in the step of the leap, or rests, goes along its velocity."""
    for text, mask in (("fixed:0", (1.0, 1.0, 1.0)), ("fixed:3", (1.0, 0.4, 0.0))):
        flow = turning(np.full((19, 1), 0.8))
        plain, bent = (run(flow, each, 20, given(*mask))[-1] for each in (text, f"{text},order=1"))
        same = [bool(mx.array_equal(plain.z[:, i], bent.z[:, i])) for i in range(3)]
        assert same == ([True] * 3 if text == "fixed:0" else [False, True, True])


def test_similarity_is_exact_for_large_latents() -> None:
    shape = (2, 15, 30, 53, 4)
    a, b = (mx.random.normal(shape, key=mx.random.key(i)) + 1.0 for i in range(2))
    step = Step(1, 30, mx.array([900.0] * 2), mx.array([800.0] * 2))
    for sample, value in enumerate(lpl.similarity(a, b, step)):
        x, y = (np.array(v[sample], np.float64).ravel() for v in (a, b))
        assert value == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)


def test_rules_accept_a_velocity_of_zero() -> None:
    """Velocities of zero never become more similar."""

    def still(z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        return mx.zeros(z.shape)

    for text, leap in (("adaptive", 17), ("reference", 16)):
        results = list(denoise(still, latents(), times(30), RFlow(), policy=rule(text, 30)))
        assert leap_of(results) == leap


def test_batch_leaps_with_its_last_sample() -> None:
    rng = np.random.default_rng(5)
    text = "adaptive:patience=2,tolerance=0.001,minimum=0.3"
    found: list[list[int]] = []
    for _ in range(20):
        cosines = 0.8 + 0.1 * rng.uniform(-1, 1, (19, 3))
        alone = [leap_of(run(turning(cosines[:, [i]]), text, 20)) for i in range(3)]
        together = leap_of(run(turning(cosines), text, 20))
        leaps = [leap for leap in alone if leap is not None]
        assert together == (max(leaps) if len(leaps) == 3 else None)
        found.append(leaps)
    assert any(len(leaps) == 3 and min(leaps) < max(leaps) for leaps in found)


def test_similarity_is_taken_per_sample() -> None:
    cosines = np.random.default_rng(6).uniform(0.5, 1, (9, 2))
    together = rule("adaptive:patience=9", 10)
    flow = turning(cosines)
    for index in range(10):
        step = Step(index, 10, mx.array([900.0] * 2), mx.array([800.0] * 2))
        together.should_leap(step, mx.zeros(0), flow(mx.zeros((2, *SHAPE[1:])), step.t, step))
    assert np.allclose(together.similarities, cosines, rtol=0, atol=rounding(1e-5))


def given(*mask: float) -> Conditioning:
    return Conditioning(mx.array([mask]), Noise([3], SHAPE[1:]))


def test_adaptive_rule_ignores_frames_that_do_not_move() -> None:
    flow = turning(np.linspace(0.5, 0.99, 29)[:, None])
    flow.noisy = (0, 2)
    steady = turning(np.ones((29, 1)))
    steady.noisy = (0, 2)
    assert leap_of(run(flow, "adaptive", 30, given(0.0, 1.0, 0.0))) is None
    assert leap_of(run(steady, "adaptive", 30, given(0.0, 1.0, 0.0))) == 17
    assert leap_of(run(steady, "adaptive", 30, given(1.0, 1.0, 0.0))) != 17


@pytest.mark.parametrize(
    ("text", "alone", "waiting"),
    [
        ("fixed:3", 3, 12),
        ("t:900", 2, 12),
        # The frame begins in step 12; two velocities compare from step 13, and one try is left.
        ("adaptive:patience=1,minimum=0.2", 4, 14),
    ],
)
def test_rules_wait_for_pending_frames(text: str, alone: int, waiting: int) -> None:
    """With strength 0.4 and 20 uniform steps, the frame starts to move at t = 400."""
    flow = turning(np.ones((19, 1)))
    assert leap_of(run(flow, text, 20, given(1.0, 1.0, 0.0))) == alone
    results = run(flow, text, 20, given(1.0, 0.4, 0.0))
    assert leap_of(results) == waiting
    assert not mx.array_equal(results[-1].z[:, 1], mx.zeros(SHAPE)[:, 1])
    assert mx.array_equal(results[-1].z[:, 2], mx.zeros(SHAPE)[:, 2])


def test_rules_do_not_wait_for_frames_that_never_move() -> None:
    flow = turning(np.ones((19, 1)))
    assert leap_of(run(flow, "fixed:3", 20, given(1.0, 0.04, 0.0))) == 3


def test_rules_leap_in_a_clip_of_given_frames() -> None:
    flow = turning(np.ones((19, 1)))
    for text in ("fixed:3", "t:500", "adaptive"):
        results = run(flow, text, 20, given(0.0, 0.0, 0.0))
        assert results[-1].is_leap
        assert mx.array_equal(results[-1].z, mx.zeros(SHAPE))


@pytest.mark.parametrize("text", ["fixed:3", "t:700", "adaptive", "reference"])
def test_runs_of_one_rule_are_independent(text: str) -> None:
    def one(seed: int) -> Iterator[StepResult]:
        return denoise(Curved(), latents(seed), times(30), RFlow(), policy=rule(text, 30))

    alone = list(one(1))
    for result, first, _ in zip(alone, one(1), one(2), strict=True):
        assert (result.is_leap, result.t) == (first.is_leap, first.t)
        assert mx.array_equal(result.z, first.z)


@pytest.mark.parametrize("name", SAMPLERS)
def test_record_has_the_leap_and_its_savings(name: str) -> None:
    sampler, flow = SAMPLERS[name], Curved()
    part = rule("fixed:3", evaluations=sampler.evaluations)
    assert part.warnings == ()
    for result in denoise(flow, latents(), times(8), sampler, policy=part.policy):
        part.on_step_end(result)
    saved = 8 * sampler.evaluations - flow.calls
    record = {"leapt": True, "after_steps": 3, "t": 625.0, "evaluations_saved": saved}
    assert part.record() == record
    assert part.summary() == (
        f"lpl: leapt to the end from t = 625, after 3 of 8 steps; {saved} evaluations saved"
    )


def test_record_has_similarities_without_a_leap() -> None:
    part = rule("adaptive:patience=9")
    results = list(denoise(Curved(), latents(), times(8), RFlow(), policy=part.policy))
    for result in results:
        part.on_step_end(result)
    record = part.record()
    assert record["leapt"] is False
    assert len(record["similarities"]) == 7
    assert record["similarities"][0] == pytest.approx([1.0, 1.0])
    assert part.summary() == "lpl: no leap in 8 steps"


@pytest.mark.parametrize(
    ("mode", "steps", "useless"),
    [
        ("fixed:7", 8, True),
        ("fixed:6", 8, False),
        ("fixed:15", 10, True),
        ("adaptive", 8, False),
        ("adaptive", 7, True),
        ("adaptive:patience=29", 30, True),
        ("reference", 17, True),
        ("reference", 18, False),
        ("t:0", 8, False),
    ],
)
def test_leap_that_can_save_nothing_warns(mode: str, steps: int, useless: bool) -> None:
    part = rule(mode, steps)
    expected = f"--lpl {Lpl.parse(mode)} can save nothing in {steps} steps."
    assert part.warnings == ((expected,) if useless else ())
