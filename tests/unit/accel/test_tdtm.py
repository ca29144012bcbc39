"""Merging of frame pairs: by definition, in the network for every length, and its account."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.accel.tdtm import MergedSteps, PairedFrames
from mlx_sora.models.hooks import Hooks
from mlx_sora.models.stdit3 import STDiT3
from mlx_sora.request.techniques import Tdtm
from tests.helpers.networks import STDIT, random_weights
from tests.helpers.tolerance import rounding


def tokens(frames: int) -> mx.array:
    return mx.random.normal((2, frames, 3, 4), key=mx.random.key(frames))


@pytest.mark.parametrize("frames", range(2, 32))
def test_merge_averages_pairs_and_unmerge_repeats_them(frames: int) -> None:
    x = np.array(tokens(frames))
    merged = PairedFrames().merge(mx.array(x))
    assert merged.shape == (2, frames // 2, 3, 4)
    for pair in range(frames // 2):
        mean = (x[:, 2 * pair] + x[:, 2 * pair + 1]) / 2
        assert np.allclose(np.array(merged[:, pair]), mean, rtol=0, atol=rounding(1e-6))
    back = PairedFrames().unmerge(merged, frames)
    assert back.shape == x.shape
    for frame in range(frames):
        assert mx.array_equal(back[:, frame], merged[:, min(frame // 2, frames // 2 - 1)])


def test_merge_keeps_a_single_frame() -> None:
    x = tokens(1)
    assert PairedFrames().merge(x) is x
    assert PairedFrames().unmerge(x, 1) is x


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_merge_keeps_the_dtype(dtype: mx.Dtype) -> None:
    merged = PairedFrames().merge(tokens(5).astype(dtype))
    assert merged.dtype == dtype
    assert PairedFrames().unmerge(merged, 5).dtype == dtype


@pytest.fixture(scope="module")
def network() -> STDiT3:
    model = STDiT3(STDIT)
    model.update(tree_unflatten(list(random_weights(model, 3).items())))
    return model


def predict(
    network: STDiT3, z: mx.array, *, merged: bool = True, x_mask: mx.array | None = None
) -> mx.array:
    text = [mx.random.normal((n, STDIT.caption_channels), key=mx.random.key(n)) for n in (3, 7)]
    conditions = network.prepare(text, z.shape[1:4], height=40, width=48, fps=24)
    context = Hooks(token_merging=PairedFrames()) if merged else None
    out = network(z, mx.array([700.0, 300.0]), conditions, x_mask, context)
    mx.eval(out)
    return out


def latents(frames: int) -> mx.array:
    return mx.random.normal((2, frames, 3, 4, STDIT.in_channels), key=mx.random.key(frames))


@pytest.mark.parametrize("frames", [2, 3, 5, 10, 13, 31])
@pytest.mark.parametrize("masked", [False, True])
def test_network_merges_every_length(network: STDiT3, frames: int, masked: bool) -> None:
    """Includes lengths on which the reference fails."""
    x_mask = (mx.arange(2 * frames) % 3 > 0).reshape(2, frames) if masked else None
    z = latents(frames)
    out, plain = (predict(network, z, merged=m, x_mask=x_mask) for m in (True, False))
    assert out.shape == (*z.shape[:-1], STDIT.out_channels)
    assert mx.isfinite(out).all().item()
    assert mx.abs(out - plain).max().item() > 1e-2


def test_network_with_one_frame_is_exact(network: STDiT3) -> None:
    assert mx.array_equal(predict(network, latents(1)), predict(network, latents(1), merged=False))


def test_network_ignores_a_mask_of_moving_frames(network: STDiT3) -> None:
    z = latents(5)
    masked = predict(network, z, x_mask=mx.ones((2, 5), dtype=mx.bool_))
    assert mx.allclose(masked, predict(network, z), rtol=0, atol=rounding(1e-5))


def test_network_applies_the_mask_to_single_frames_of_a_pair(network: STDiT3) -> None:
    """Modulation sees single frames, as in the reference: half of a pair may be at t = 0."""
    z, first = latents(4), mx.array([[False, True, True, True]] * 2)
    second = mx.array([[True, False, True, True]] * 2)
    one, other, all_moving = (predict(network, z, x_mask=m) for m in (first, second, None))
    assert mx.abs(one - other).max().item() > 1e-3
    assert mx.abs(one - all_moving).max().item() > 1e-3


def watched(part: MergedSteps, steps: int) -> MergedSteps:
    for index in range(steps):
        result: Any = SimpleNamespace(step=SimpleNamespace(index=index))
        part.on_step_end(result)
    return part


@pytest.mark.parametrize(
    ("asked", "steps", "merged"), [("1", 6, 1), ("4", 6, 4), ("6", 6, 6), ("all", 6, 6)]
)
def test_steps_merge_at_first(asked: str, steps: int, merged: int) -> None:
    part = MergedSteps(Tdtm.parse(asked), ScheduleInfo(steps, 1, 15))
    assert [part.token_merging(i) is not None for i in range(steps)] == [
        i < merged for i in range(steps)
    ]
    assert part.warnings == ()
    record = watched(part, steps).record()
    assert record == {"merged_steps": merged, "frames": 15, "attending": 7}
    assert f"7 instead of 15 latent frames attended in {merged} of 6 steps" in part.summary()


def test_record_counts_finished_steps() -> None:
    part = watched(MergedSteps(Tdtm.parse("15"), ScheduleInfo(30, 1, 20)), 4)
    assert part.record()["merged_steps"] == 4


def test_more_steps_than_the_run_has_warn() -> None:
    part = watched(MergedSteps(Tdtm.parse("31"), ScheduleInfo(30, 1, 20)), 30)
    assert part.warnings == ("--tdtm 31 covers all of the 30 steps.",)
    assert part.record()["merged_steps"] == 30


def test_image_merges_nothing() -> None:
    part = watched(MergedSteps(Tdtm.parse("all"), ScheduleInfo(30, 1, 1)), 30)
    assert "single frame" in part.warnings[0]
    assert part.token_merging(0) is None
    assert part.record() == {"merged_steps": 0, "frames": 1, "attending": 1}
    assert "no frames merged" in part.summary()
