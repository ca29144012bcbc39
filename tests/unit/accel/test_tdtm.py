"""Merging of frame pairs: by definition, in the network for every length, and its account."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.accel.tdtm import FramePairs, MergedSites, MergedSteps, PairedFrames
from mlx_sora.errors import UsageError
from mlx_sora.models.hooks import Hooks, NoMerging
from mlx_sora.models.stdit3 import STDiT3
from mlx_sora.request.techniques import SITES, Tdtm
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


@pytest.mark.parametrize("frames", range(1, 8))
def test_a_site_averages_pairs_and_keeps_an_odd_last_frame(frames: int) -> None:
    x, pairs = tokens(frames), FramePairs()
    merged = pairs.merge(x)
    groups = [list(range(frames))[i : i + 2] for i in range(0, frames, 2)]
    for number, group in enumerate(groups):
        mean = sum(x[:, frame] for frame in group) / len(group)
        assert mx.allclose(merged[:, number], mean, rtol=0, atol=rounding(1e-6))
    back = pairs.unmerge(merged, frames)
    assert back.shape == x.shape
    assert all(mx.array_equal(back[:, i], merged[:, i // 2]) for i in range(frames))
    means = [sum(group) / len(group) for group in groups]
    assert pairs.positions(frames).tolist() == means


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_merging_equal_frames_changes_nothing(network: STDiT3, site: str, frames: int) -> None:
    """Of equal frames the mean is each of them; only positions in time tell them apart."""
    block = network.spatial_blocks[1]
    x = mx.repeat(mx.random.normal((2, 1, 6, STDIT.hidden_size), key=mx.random.key(0)), frames, 1)
    modulation = mx.random.normal((2, 1, 6, STDIT.hidden_size), key=mx.random.key(1))
    text = block.cross_attn.keys_values(
        mx.random.normal((2, 4, STDIT.hidden_size), key=mx.random.key(2))
    )
    merging = MergedSites((site,), range(9))
    out, plain = (
        block(x, modulation, text, None, network.rope, partial(each.at, 1))
        for each in (merging, NoMerging())
    )
    assert mx.allclose(out, plain, rtol=rounding(1e-4), atol=rounding(1e-4))


def test_keys_are_merged_at_their_true_positions(network: STDiT3) -> None:
    """Written out: queries of each frame, keys and values of pairs between the two."""
    layer, frames, heads = network.temporal_blocks[0].attn, 5, STDIT.num_heads
    x = mx.random.normal((1, frames, 3, STDIT.hidden_size), key=mx.random.key(2))
    merging = MergedSites(("temporal-kv",), range(9))
    out = layer(x, network.rope, partial(merging.at, 0))
    pairs = mx.stack([(x[:, 0] + x[:, 1]) / 2, (x[:, 2] + x[:, 3]) / 2, x[:, 4]], axis=1)

    def split(layer_out: mx.array, count: int) -> list[mx.array]:
        parts = mx.split(layer_out, count, axis=-1)
        return [p.reshape(1, p.shape[1], 3, heads, -1).transpose(0, 2, 3, 1, 4) for p in parts]

    q, (_, k, v) = split(layer.qkv(x), 3)[0], split(layer.qkv(pairs), 3)
    q, k = layer.q_norm(q), layer.k_norm(k)
    q = network.rope(q, mx.arange(frames))
    k = network.rope(k, mx.array([0.5, 2.5, 4.0]))
    weights = mx.softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, axis=-1)
    expected = layer.proj((weights @ v).transpose(0, 3, 1, 2, 4).reshape(x.shape))
    assert mx.allclose(out, expected, rtol=rounding(1e-4), atol=rounding(1e-4))


def test_positions_of_the_whole_sequence_are_the_usual_rotation(network: STDiT3) -> None:
    x = mx.random.normal((2, 3, 7, STDIT.head_dim), key=mx.random.key(3))
    assert mx.allclose(network.rope(x, mx.arange(7)), network.rope(x), rtol=0, atol=rounding(1e-5))


@pytest.mark.parametrize("site", SITES)
def test_each_site_merges_in_its_blocks_only(network: STDiT3, site: str) -> None:
    z = latents(5)
    text = [mx.random.normal((3, STDIT.caption_channels), key=mx.random.key(3))] * 2
    conditions = network.prepare(text, z.shape[1:4], height=40, width=48, fps=24)

    def predict_with(blocks: range) -> mx.array:
        hooks = Hooks(token_merging=MergedSites((site,), blocks))
        return network(z, mx.array([700.0, 300.0]), conditions, None, hooks)

    plain = network(z, mx.array([700.0, 300.0]), conditions)
    none, first, every = (predict_with(range(n)) for n in (0, 1, 9))
    assert mx.array_equal(none, plain)
    assert mx.abs(first - plain).max().item() > 1e-4
    assert mx.abs(every - first).max().item() > 1e-4


TIMES = (1000.0, 800.0, 600.0, 400.0, 200.0)


@pytest.mark.parametrize(
    ("text", "merged"),
    [
        ("last:2", [3, 4]),
        ("last:9", [0, 1, 2, 3, 4]),
        ("between:300,800", [1, 2, 3]),
        ("between:0,1000,sites=mlp", [0, 1, 2, 3, 4]),
        ("2,sites=cross,blocks=1-2", [0, 1]),
    ],
)
def test_steps_and_sites_of_a_text(text: str, merged: list[int]) -> None:
    config = Tdtm.parse(text)
    assert Tdtm.parse(str(config)) == config
    part = MergedSteps(config, ScheduleInfo(5, 1, 15, times=TIMES))
    assert [i for i in range(5) if part.token_merging(i) is not None] == merged
    record = watched(part, 5).record()
    assert record["merged_steps"] == len(merged)
    assert record.get("sites", []) == list(config.merged_sites)
    assert "in " + str(len(merged)) in part.summary()


def test_a_range_without_a_step_warns() -> None:
    part = MergedSteps(Tdtm.parse("between:850,900"), ScheduleInfo(5, 1, 15, times=TIMES))
    assert "merges nothing" in part.warnings[0]


def test_blocks_that_the_model_has_not_warn() -> None:
    config = Tdtm.parse("5,sites=cross,blocks=3-9")
    part = watched(MergedSteps(config, ScheduleInfo(5, 1, 15, blocks=3)), 5)
    assert part.warnings == (f"--tdtm {config} merges nothing: the model's blocks are 0-2.",)
    assert part.summary() == "tdtm: no frames merged"
    assert MergedSteps(config, ScheduleInfo(5, 1, 15, blocks=4)).token_merging(0) is not None


@pytest.mark.parametrize(
    "text",
    [
        "last:2,sites=eyes",
        "2,sites=cross+cross",
        "2,sites=spatial+spatial-kv",
        "2,blocks=1-2",
        "2,sites=mlp,blocks=3-1",
        "2,sites=mlp,blocks=a",
        "between:800,300",
        "last:0",
    ],
)
def test_bad_texts_are_refused(text: str) -> None:
    with pytest.raises((UsageError, ValueError)):
        Tdtm.parse(text)
