"""Noise depends on the seed and on nothing else."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora.request.generation import MAX_SEED
from mlx_sora.sampling.noise import Noise

SHAPE = (5, 8, 8, 4)


def test_noise_depends_only_on_the_seed() -> None:
    first = Noise([42], SHAPE).initial()
    mx.random.seed(1)
    mx.random.normal((10,))
    again = Noise([42], SHAPE).initial()
    assert np.array(first).tobytes() == np.array(again).tobytes()


def test_noise_does_not_touch_the_global_state() -> None:
    mx.random.seed(5)
    expected = mx.random.normal((4,))
    mx.random.seed(5)
    mx.eval(Noise([42], SHAPE).initial())
    assert mx.array_equal(mx.random.normal((4,)), expected)


@pytest.mark.parametrize("index", [None, 0, 12])
def test_batch_has_the_noise_of_its_samples(index: int | None) -> None:
    seeds = [0, 7, MAX_SEED]

    def draw(some: list[int]) -> mx.array:
        noise = Noise(some, SHAPE)
        return noise.initial() if index is None else noise(index)

    both = draw(seeds)
    assert both.shape == (3, *SHAPE)
    for i, seed in enumerate(seeds):
        assert mx.array_equal(both[i], draw([seed])[0])


def test_noise_is_independent_across_seeds_and_steps() -> None:
    draws = [Noise([seed], SHAPE) for seed in (0, 1, 2**32, MAX_SEED)]
    flat = mx.stack([d.flatten() for n in draws for d in (n.initial(), n(0), n(1), n(29))])
    correlation = flat @ flat.T / flat.shape[1] - mx.eye(len(flat))
    assert float(mx.abs(correlation).max()) < 0.15  # 16 draws of 1280 normals: sigma 0.03
    assert abs(float(flat.mean())) < 0.03
    assert abs(float(mx.std(flat)) - 1.0) < 0.03
