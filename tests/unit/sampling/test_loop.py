"""The denoising loop: given frames, leaps, x0, and restored runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora.sampling import SAMPLERS
from mlx_sora.sampling.base import State, Step
from mlx_sora.sampling.loop import Conditioning, RestoredSteps, StepResult, denoise
from mlx_sora.sampling.midpoint import Midpoint
from mlx_sora.sampling.noise import Noise
from mlx_sora.sampling.rflow import RFlow, add_noise
from tests.helpers.flows import SHAPE, Curved, Straight, latents, times
from tests.helpers.tolerance import rounding

BATCH, FRAMES = SHAPE[:2]


def run(mask: mx.array | None = None, steps: int = 8) -> list[StepResult]:
    """Return the steps of the curved flow, with a frame mask or without."""
    given = None if mask is None else Conditioning(mask, Noise([7, 8], SHAPE[1:]))
    return list(denoise(Curved(), latents(), times(steps), RFlow(), conditioning=given))


def test_loop_is_deterministic() -> None:
    mask = mx.array([[0.0, 0.5, 1.0], [1.0, 0.3, 0.0]])
    first = run(mask)
    mx.random.normal((3,))  # the global random state is none of the loop's business
    again = run(mask)
    for a, b in zip(first, again, strict=True):
        assert np.array(a.z).tobytes() == np.array(b.z).tobytes()


def test_mask_of_ones_is_no_mask() -> None:
    for masked, plain in zip(run(mx.ones((BATCH, FRAMES))), run(), strict=True):
        assert mx.array_equal(masked.z, plain.z)
        assert mx.array_equal(masked.v, plain.v)


def test_given_frames_do_not_change() -> None:
    start, results = latents(), run(mx.array([[0.0, 1.0, 0.0]]))
    assert mx.array_equal(results[-1].z[:, ::2], start[:, ::2])
    assert not mx.array_equal(results[-1].z[:, 1], start[:, 1])


def test_frame_between_waits_for_its_level_and_receives_noise_once() -> None:
    asked: list[int] = []
    draws = Noise([7, 8], SHAPE[1:])

    def noise(index: int) -> mx.array:
        asked.append(index)
        return draws(index)

    mask = mx.array([[0.5, 1.0, 0.0], [0.125, 1.0, 0.5]])
    given = Conditioning(mask, noise)
    results = list(denoise(Curved(), latents(), times(8), RFlow(), conditioning=given))
    # Times 1000, 875, ... 125: level 500 is reached at step 4, level 125 at step 7.
    assert asked == [4, 7]
    start = latents()
    for index in range(4):
        assert mx.array_equal(results[index].z[0, 0], start[0, 0])
    level = add_noise(start, draws(4), mx.full((BATCH,), 500.0))
    assert mx.allclose(results[4].z_in[0, 0], level[0, 0], atol=rounding(1e-6))
    assert mx.array_equal(results[4].z_in[1, 0], start[1, 0])
    assert mx.array_equal(results[5].z_in, results[4].z)


def test_velocity_receives_the_frame_mask() -> None:
    flow = Straight(latents(1))
    mask = mx.array([[0.0, 0.5, 1.0]])
    list(
        denoise(
            flow,
            latents(),
            times(4),
            RFlow(),
            conditioning=Conditioning(mask, Noise([1, 2], SHAPE[1:])),
        )
    )
    seen = [None if m is None else m.astype(mx.int32).tolist() for m in flow.masks]
    late, early = [[0, 1, 1]] * BATCH, [[0, 0, 1]] * BATCH
    assert seen == [early, early, late, late]


@dataclass
class LeapAt:
    """Policy that leaps at step `index` and records its calls."""

    index: int
    seen: list[tuple[int, float]] = field(default_factory=list)

    def should_leap(self, step: Step, z: mx.array, v: mx.array, /) -> bool:
        self.seen.append((step.index, float(step.t[0])))
        return step.index == self.index

    def leap_velocity(self, step: Step, v: mx.array, /) -> mx.array:
        return v

    def state(self) -> State:
        return {}

    def restore(self, state: State, /) -> None:
        assert state == {}


def test_leap_goes_straight_to_zero_and_ends_the_run() -> None:
    policy, flow = LeapAt(2), Curved()
    results = list(denoise(flow, latents(), times(8), RFlow(), policy=policy))
    assert [r.is_leap for r in results] == [False, False, True]
    assert flow.calls == 3
    assert policy.seen == [(0, 1000.0), (1, 875.0), (2, 750.0)]
    last = results[-1]
    assert mx.allclose(last.z, last.z_in + 0.75 * last.v, atol=rounding(1e-6))
    assert mx.array_equal(last.z, last.x0)
    for plain, leaping in zip(run(), results[:2], strict=False):
        assert mx.array_equal(plain.z, leaping.z)


def test_leap_does_not_change_given_frames() -> None:
    given = Conditioning(mx.array([[0.0, 1.0, 1.0]]), Noise([1, 2], SHAPE[1:]))
    *_, last = denoise(Curved(), latents(), times(8), RFlow(), policy=LeapAt(3), conditioning=given)
    assert mx.array_equal(last.z[:, 0], latents()[:, 0])


def test_x0_is_the_end_of_a_straight_flow() -> None:
    flow = Straight(latents(1))
    for result in denoise(flow, latents(), times(6), RFlow()):
        assert mx.allclose(result.x0, flow.end, atol=rounding(1e-5))


def test_x0_has_given_frames_unchanged() -> None:
    for result in run(mx.array([[0.0, 1.0, 1.0]])):
        assert mx.array_equal(result.x0[:, 0], latents()[:, 0])


def test_loop_computes_nothing_ahead() -> None:
    flow = Curved()
    steps = denoise(flow, latents(), times(8), RFlow())
    assert flow.calls == 0
    for expected in (1, 2, 3):
        next(steps)
        assert flow.calls == expected


def test_results_have_step_and_time() -> None:
    results = run(steps=4)
    assert [r.t for r in results] == [1000.0, 750.0, 500.0, 250.0]
    assert [(r.step.index, r.step.total) for r in results] == [(i, 4) for i in range(4)]
    assert all(r.seconds > 0 for r in results)
    assert mx.array_equal(results[1].z_in, results[0].z)


def test_rising_times_invert_the_flow() -> None:
    """From noise to the end and back, in small steps."""
    *_, there = denoise(Curved(), latents(), times(400), RFlow())
    *_, back = denoise(Curved(), there.z, times(400)[::-1], RFlow())
    assert mx.allclose(back.z, latents(), atol=0.01)


def test_velocity_fn_receives_given_frames_unchanged() -> None:
    """Frames that do not move are unchanged in every evaluation of a step."""
    start, seen = latents(), list[mx.array]()

    def flow(z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        seen.append(z)
        return z + 1.0

    given = Conditioning(mx.array([[0.0, 1.0, 1.0]]), Noise([1, 2], SHAPE[1:]))
    list(denoise(flow, start, times(3), Midpoint(), conditioning=given))
    assert len(seen) == 6
    for z in seen:
        assert mx.array_equal(z[:, 0], start[:, 0])


def test_step_has_pending_frames() -> None:
    """Frames that no step moves, as with a mask of 0.04, do not wait."""
    seen: list[list[list[bool]] | None] = []

    def flow(z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        seen.append(None if step.pending is None else step.pending.tolist())  # type: ignore[arg-type]
        return z

    given = Conditioning(mx.array([[0.5, 1.0, 0.04]] * BATCH), Noise([1, 2], SHAPE[1:]))
    list(denoise(flow, latents(), times(4), RFlow(), conditioning=given))
    assert seen == [[[True, False, False]] * BATCH] * 2 + [None] * 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_restored_run_continues_exactly(sampler: str) -> None:
    """After any step, also while frames are pending and in the step in which they start."""
    asked: list[int] = []
    draws = Noise([7, 8], SHAPE[1:])

    def noise(index: int) -> mx.array:
        asked.append(index)
        return draws(index)

    def steps(z: mx.array, made: RestoredSteps | None = None) -> Iterator[StepResult]:
        given = Conditioning(mx.array([[0.0, 0.5, 1.0], [1.0, 0.3, 0.0]]), noise)
        way = times(8), SAMPLERS[sampler]
        return denoise(Curved(), z, *way, conditioning=given, restored=made)

    whole = [(result, result.state()) for result in steps(latents())]
    for result, state in whole:
        made = result.step.index + 1
        asked.clear()
        rest = list(steps(result.z, RestoredSteps(made, state)))
        assert asked == [index for index in (4, 6) if index >= made]
        assert len(rest) == 8 - made
        for again, (once, _) in zip(rest, whole[made:], strict=True):
            assert mx.array_equal(again.z, once.z)
