"""Every sampler of the registry, and the times of rectified flow."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import pytest

from mlx_sora.errors import UsageError
from mlx_sora.geometry import aspect_ratios, get_image_size
from mlx_sora.sampling import SAMPLERS
from mlx_sora.sampling.loop import Conditioning, denoise
from mlx_sora.sampling.noise import Noise
from mlx_sora.sampling.rflow import RFlow, add_noise
from tests.helpers.flows import SHAPE, Curved, Straight, latents, times
from tests.helpers.tolerance import rounding

#: Order of convergence that each sampler promises.
ORDERS = {"rflow": 1, "midpoint": 2, "ab2": 2}


#: Grids from 1000 to 0 by number of steps: steps alike, growing, and in turn long and short.
GRIDS: dict[str, Callable[[int], mx.array]] = {
    "even": times,
    "growing": lambda steps: 1000.0 * (1.0 - (1.0 - times(steps) / 1000.0) ** 2),
    "alternating": lambda steps: mx.array(
        [1000.0 * (1.0 - (i + 0.35 * (i % 2)) / steps) for i in range(steps + 1)]
    )[:, None],
}


def outcome(name: str, steps: int, grid: str = "even") -> mx.array:
    """Return the end of the curved flow after `steps` steps."""
    *_, last = denoise(Curved(), latents(), GRIDS[grid](steps), SAMPLERS[name])
    return last.z


def error(name: str, steps: int, grid: str = "even") -> float:
    return float(mx.abs(outcome(name, steps, grid) - Curved.end(latents())).max())


def test_samplers_all_have_an_order() -> None:
    assert set(ORDERS) == set(SAMPLERS)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_converges_with_its_order(name: str, grid: str) -> None:
    coarse, fine = error(name, 32, grid), error(name, 128, grid)
    assert math.log(coarse / fine, 4) > ORDERS[name] - 0.25


def test_first_order_sampler_stays_first_order() -> None:
    """The orders above do not come from the flow."""
    assert math.log(error("rflow", 32) / error("rflow", 128), 4) < 1.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_follow_their_own_times(name: str) -> None:
    both = mx.concatenate([GRIDS["growing"](8), GRIDS["alternating"](8)], axis=1)
    *_, together = denoise(Curved(), latents(), both, SAMPLERS[name])
    for sample in range(2):
        one = both[:, sample : sample + 1]
        *_, alone = denoise(Curved(), latents()[sample : sample + 1], one, SAMPLERS[name])
        assert mx.allclose(together.z[sample], alone.z[0], rtol=rounding(1e-6), atol=rounding(1e-6))


@pytest.mark.parametrize("name", SAMPLERS)
def test_fresh_frame_has_no_history(name: str) -> None:
    """A frame that starts at 500 ends as in a run of its own from there."""
    noise = Noise([7, 8], SHAPE[1:])
    given = Conditioning(mx.array([[0.5, 1.0, 0.0]]), noise)
    *_, last = denoise(Curved(), latents(), times(8), SAMPLERS[name], conditioning=given)
    begin = add_noise(latents(), noise(4), mx.full((SHAPE[0],), 500.0))
    *_, alone = denoise(Curved(), begin, times(8)[4:], SAMPLERS[name])
    assert mx.allclose(last.z[:, 0], alone.z[:, 0], rtol=rounding(1e-6), atol=rounding(1e-6))
    assert mx.array_equal(last.z[:, 2], latents()[:, 2])


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_inverts_the_flow(name: str) -> None:
    *_, there = denoise(Curved(), latents(), times(200), SAMPLERS[name])
    *_, back = denoise(Curved(), there.z, times(200)[::-1], SAMPLERS[name])
    assert mx.allclose(back.z, latents(), rtol=0, atol=0.05 ** ORDERS[name])


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_makes_its_number_of_evaluations(name: str) -> None:
    flow = Curved()
    results = list(denoise(flow, latents(), times(5), SAMPLERS[name]))
    assert [result.step.index for result in results] == [0, 1, 2, 3, 4]
    assert flow.calls == 5 * SAMPLERS[name].evaluations


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_sampler_is_exact_on_a_straight_flow(name: str, steps: int) -> None:
    flow = Straight(latents(1))
    schedule = SAMPLERS[name].timesteps(steps, height=64, width=64, num_frames=51)
    *_, last = denoise(flow, latents(), schedule, SAMPLERS[name])
    assert mx.allclose(last.z, flow.end, rtol=0, atol=rounding(1e-5))


@pytest.mark.parametrize("name", SAMPLERS)
def test_runs_of_one_sampler_are_independent(name: str) -> None:
    """Two runs of one sampler object, step by step in turn."""
    alone = outcome(name, 6)
    first = denoise(Curved(), latents(), times(6), SAMPLERS[name])
    other = denoise(Curved(), latents(5), times(6), SAMPLERS[name])
    pairs = list(zip(first, other, strict=True))
    assert mx.array_equal(pairs[-1][0].z, alone)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("resolution", ["144p", "240p", "720p"])
@pytest.mark.parametrize("frames", [1, 17, 51, 408])
def test_timesteps_fall_from_noise_to_zero(name: str, resolution: str, frames: int) -> None:
    """Never above 1000, where float32 rounding would put some image sizes."""
    for ratio in aspect_ratios():
        width, height = get_image_size(resolution, ratio)
        schedule = SAMPLERS[name].timesteps(30, height=height, width=width, num_frames=frames)
        assert schedule.shape == (31, 1)
        assert schedule.dtype == mx.float32
        assert 1000.0 - 1e-3 <= float(schedule[0]) <= 1000.0
        assert float(schedule[-1]) == 0.0
        assert mx.all(schedule[1:] < schedule[:-1]).item()


def test_timesteps_need_the_limit_at_1000() -> None:
    sizes = [get_image_size("144p", ratio) for ratio in aspect_ratios()]
    ratios = [mx.sqrt(mx.array(float(w)) * h / 512**2) for w, h in sizes]
    assert max(float(r / (1.0 + (r - 1.0)) * 1000.0) for r in ratios) > 1000.0


def test_timesteps_follow_the_size_of_each_sample() -> None:
    heights, widths, frames = [64.0, 240.0], [64.0, 426.0], [17.0, 102.0]
    both = RFlow().timesteps(
        12, height=mx.array(heights), width=mx.array(widths), num_frames=mx.array(frames)
    )
    assert both.shape == (13, 2)
    for i in range(2):
        one = RFlow().timesteps(12, height=heights[i], width=widths[i], num_frames=frames[i])
        assert mx.array_equal(both[:, i : i + 1], one)
    assert mx.all(both[1:-1, 1] > both[1:-1, 0]).item(), "the larger video stays longer in noise"


def test_timesteps_without_transform_are_uniform() -> None:
    schedule = RFlow(use_timestep_transform=False).timesteps(
        4, height=720, width=1280, num_frames=51
    )
    assert schedule[:, 0].tolist() == [1000.0, 750.0, 500.0, 250.0, 0.0]


def test_discrete_timesteps_round_to_even_before_the_shift() -> None:
    schedule = RFlow(use_discrete_timesteps=True, use_timestep_transform=False).timesteps(
        16, height=512, width=512, num_frames=1
    )
    assert schedule[:3, 0].tolist() == [1000.0, 938.0, 875.0]
    assert float(schedule[15, 0]) == 62.0  # 62.5


@pytest.mark.parametrize("frames", [2, 16])
def test_timesteps_refuse_short_clips(frames: int) -> None:
    with pytest.raises(UsageError, match="2 to 16 frames"):
        RFlow().timesteps(30, height=240, width=426, num_frames=frames)


@pytest.mark.parametrize("steps", [0, -3])
def test_timesteps_refuse_zero_steps(steps: int) -> None:
    with pytest.raises(UsageError, match="at least 1 step"):
        RFlow().timesteps(steps, height=240, width=426, num_frames=17)


def test_add_noise_at_both_ends_and_between() -> None:
    x, noise = latents(), latents(1)
    assert mx.array_equal(add_noise(x, noise, mx.array([0.0, 0.0])), x)
    assert mx.array_equal(add_noise(x, noise, mx.array([1000.0, 1000.0])), noise)
    mixed = add_noise(x, noise, mx.array([250.0, 500.0]))
    assert mx.allclose(mixed[0], 0.75 * x[0] + 0.25 * noise[0], atol=rounding(1e-6))
    assert mx.allclose(mixed[1], 0.5 * x[1] + 0.5 * noise[1], atol=rounding(1e-6))
