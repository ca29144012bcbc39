"""Guidance: which texts each call has, and that batched and sequential calls agree."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_sora.models.stdit3 import STDiT3, STDiT3Config
from mlx_sora.sampling.base import Step
from mlx_sora.sampling.guidance import CFGSlice, Guidance, NoisedFrames
from mlx_sora.sampling.rflow import add_noise
from tests.helpers.flows import SHAPE, latents
from tests.helpers.models import BoundModel
from tests.helpers.tolerance import rounding

TEXT = [latents(3, (5, 6)), latents(4, (2, 6))]
NULL = latents(5, (8, 6))
T = mx.array([700.0, 400.0])


class Recorder:
    """A made-up network with twice the channels of z; records texts and calls."""

    def __init__(self) -> None:
        self.texts: list[list[mx.array]] = []
        self.latents: list[mx.array] = []
        self.slices: list[CFGSlice] = []
        self.batches: list[int] = []
        self.masks: list[mx.array | None] = []
        self.indices: list[int] = []

    def prepare(self, text: Sequence[mx.array]) -> mx.array:
        self.texts.append(list(text))
        return mx.stack([sample.mean() for sample in text]).reshape(-1, 1, 1, 1, 1)

    def __call__(
        self,
        z: mx.array,
        t: mx.array,
        conditions: mx.array,
        x_mask: mx.array | None,
        step: int,
        cfg_slice: CFGSlice,
        /,
    ) -> mx.array:
        self.latents.append(z)
        self.slices.append(cfg_slice)
        self.batches.append(len(z))
        self.masks.append(x_mask)
        self.indices.append(step)
        v = mx.tanh(z * conditions) + t.reshape(-1, 1, 1, 1, 1) / 1000.0
        return mx.concatenate([v, mx.full(v.shape, 99.0)], axis=-1)


def step(x_mask: mx.array | None = None) -> Step:
    return Step(3, 10, T, T - 100.0, x_mask)


def null_text(length: int) -> mx.array:
    return NULL[:length]


def test_guidance_extrapolates_from_uncond() -> None:
    z = latents()
    v = Guidance(Recorder(), TEXT, null_text, 7.0)(z, T, step())
    means = [mx.stack([x.mean() for x in half]) for half in (TEXT, [NULL[:5], NULL[:2]])]
    with_, without = (mx.tanh(z * m.reshape(-1, 1, 1, 1, 1)) for m in means)
    expected = without + 7.0 * (with_ - without) + (T / 1000.0).reshape(-1, 1, 1, 1, 1)
    assert v.shape == SHAPE
    assert mx.allclose(v, expected, rtol=0, atol=rounding(1e-5))


def test_batched_guidance_is_one_call_with_cond_first() -> None:
    seen = Recorder()
    x_mask = mx.array([[True, False, True], [True, True, False]])
    Guidance(seen, TEXT, null_text, 4.0)(latents(), T, step(x_mask))
    assert seen.batches == [4]
    assert [len(sample) for sample in seen.texts[0]] == [5, 2, 5, 2]
    assert mx.array_equal(seen.texts[0][3], NULL[:2])
    assert seen.masks[0] is not None
    assert mx.array_equal(seen.masks[0], mx.concatenate([x_mask, x_mask]))
    assert seen.indices == [3]


def test_sequential_guidance_is_two_calls_of_half_the_size() -> None:
    seen = Recorder()
    Guidance(seen, TEXT, null_text, 4.0, sequential=True)(latents(), T, step())
    assert seen.batches == [2, 2]
    assert [[len(s) for s in texts] for texts in seen.texts] == [[5, 2], [5, 2]]
    assert seen.indices == [3, 3]


def test_scale_one_never_uses_the_null_text() -> None:
    def never(length: int) -> mx.array:
        raise AssertionError("the half without prompt has no weight")

    seen = Recorder()
    v = Guidance(seen, TEXT, never, 1.0)(latents(), T, step())
    assert seen.batches == [2]
    close = Guidance(Recorder(), TEXT, null_text, 1.0 + 1e-6)(latents(), T, step())
    assert mx.allclose(v, close, rtol=0, atol=rounding(1e-5))


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("cond", [False, True])
def test_fixed_frames_are_shown_noised(cond: bool, sequential: bool) -> None:
    """At the time of the step: to both predictions, or (joint guidance) to uncond only."""
    seen, z, noise = Recorder(), latents(), latents(9)
    mask = mx.array([[True, False, True], [True, True, False]])
    noised = NoisedFrames(noise, cond)
    guidance = Guidance(seen, TEXT, null_text, 4.0, sequential, noised=noised)
    guidance(z, T, step(mask))
    assert seen.batches == ([2, 2] if sequential else [4])
    first, second = mx.split(mx.concatenate(seen.latents), 2)
    expected = mx.where(mask[:, :, None, None, None], z, add_noise(z, noise, T))
    assert mx.array_equal(second, expected)
    assert mx.array_equal(first, expected if cond else z)
    if cond:
        assert seen.masks == [None] * len(seen.masks)
    elif sequential:
        assert seen.masks == [mask, None]
    else:
        assert mx.array_equal(seen.masks[0], mx.concatenate([mask, mx.ones_like(mask)]))


def test_without_fixed_frames_none_is_shown_noised() -> None:
    noised = NoisedFrames(latents(9), cond=True)
    plain, same = (
        Guidance(Recorder(), TEXT, null_text, 4.0, noised=each)(latents(), T, step())
        for each in (None, noised)
    )
    assert mx.array_equal(plain, same)


@pytest.mark.parametrize(
    ("mask", "cond"),
    [
        (None, None),
        (mx.array([[True, False, True], [True, True, True]]), None),
        (mx.array([[True, False, True], [True, True, True]]), False),
    ],
)
def test_batched_guidance_equals_sequential_on_the_network(
    mask: mx.array | None, cond: bool | None
) -> None:
    """Prompts of different lengths, so that one call has to mask what two calls need not."""
    config = STDiT3Config.from_dict(
        {"hidden_size": 24, "num_heads": 2, "depth": 2, "caption_channels": 6}
    )
    model = STDiT3(config)
    filled = {k: 0.3 * latents(i, p.shape) for i, (k, p) in enumerate(_parameters(model))}
    model.load_weights(list(filled.items()))

    bound = BoundModel(model, SHAPE[1:4], height=16, width=16, fps=24)
    noised = None if cond is None else NoisedFrames(latents(9), cond)
    batched, sequential = (
        Guidance(bound, TEXT, model.null_text, 7.0, each, noised=noised)(latents(), T, step(mask))
        for each in (False, True)
    )
    difference = mx.abs(batched - sequential).max()
    assert float(difference / mx.std(batched)) <= rounding(1e-5)


def _parameters(model: STDiT3) -> list[tuple[str, mx.array]]:
    flat = tree_flatten(model.parameters())
    assert isinstance(flat, list)
    return flat
