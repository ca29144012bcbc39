"""Shared values: kept as they are, given back by time, counted, and never a trace without them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sora.accel.cidl import BlockStream
from mlx_sora.accel.tdtm import PairedFrames
from mlx_sora.accel.value_sharing import CapturedValues, captured_bytes
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_transformer, stream_transformer
from mlx_sora.models.hooks import Hooks, ValueSharing
from mlx_sora.models.stdit3 import BlockPair, STDiT3
from tests.helpers import networks


@pytest.fixture(scope="module")
def network(model: ModelFolder) -> STDiT3:
    return load_transformer(model, mx.float32)


def latents(seed: int, batch: int = 1) -> mx.array:
    z = mx.random.normal((1, *networks.GRID, networks.STDIT.in_channels), key=mx.random.key(seed))
    return mx.tile(z, (batch, 1, 1, 1, 1))


def predict(
    network: STDiT3,
    z: mx.array,
    values: ValueSharing | None,
    *,
    context: Hooks[BlockPair] | None = None,
) -> mx.array:
    context = context or Hooks()
    text = [mx.random.normal((n + 3, 32), key=mx.random.key(9)) for n in range(len(z))]
    conditions = network.prepare(text, networks.GRID, height=40, width=48, fps=24)
    context = Hooks(context.blocks, context.token_merging, values)
    out = network(z, mx.full((len(z),), 500.0), conditions, None, context)
    mx.eval(out)
    return out


def test_keeping_changes_nothing(network: STDiT3) -> None:
    kept = CapturedValues()
    assert mx.array_equal(
        predict(network, latents(1), kept.capture(500.0)), predict(network, latents(1), None)
    )
    assert kept.evaluations == 1


def test_what_is_kept_is_counted_in_advance(network: STDiT3) -> None:
    kept = CapturedValues()
    for t in (900.0, 800.0):
        predict(network, latents(1), kept.capture(t))
    assert kept.nbytes == captured_bytes(networks.STDIT, networks.GRID, 2, 4) > 0


def test_own_values_back_are_the_plain_pass(network: STDiT3) -> None:
    kept = CapturedValues()
    plain = predict(network, latents(1), kept.capture(500.0))
    assert mx.array_equal(predict(network, latents(1), kept.reuse(500.0)), plain)


def test_other_values_change_the_outcome(network: STDiT3) -> None:
    kept = CapturedValues()
    predict(network, latents(1), kept.capture(500.0))
    shared = predict(network, latents(2), kept.reuse(500.0))
    assert mx.abs(shared - predict(network, latents(2), None)).max().item() > 1e-2


def test_both_halves_of_a_guided_batch_get_them(network: STDiT3) -> None:
    kept = CapturedValues()
    predict(network, latents(1), kept.capture(500.0))
    both = predict(network, latents(2, batch=2), kept.reuse(500.0))
    alone = predict(network, latents(2), kept.reuse(500.0))
    assert mx.allclose(both[:1], alone, rtol=0, atol=1e-4)
    plain = predict(network, latents(2, batch=2), None)
    assert mx.abs(both[1:] - plain[1:]).max().item() > 1e-2


def test_the_nearest_time_is_taken() -> None:
    kept = CapturedValues()
    for t in (900.0, 800.0, 600.0):
        kept.capture(t).values(mx.full((1, 1, 1, 1), t), 0)
    asked = {1000.0: 900.0, 900.0: 900.0, 830.0: 800.0, 650.0: 600.0, 0.0: 600.0}
    for t, nearest in asked.items():
        policy = kept.reuse(t)
        assert policy is not None
        assert policy.values(mx.zeros((1, 1, 1, 1)), 0).item() == nearest


def test_nothing_kept_is_nothing_shared() -> None:
    assert CapturedValues().reuse(500.0) is None


def test_frames_in_time_keep_their_own() -> None:
    """One entry per spatial block: temporal blocks are never asked."""
    blocks: list[int] = []

    class Spy:
        def values(self, v: mx.array, block: int) -> mx.array:
            blocks.append(block)
            assert v.shape[0] == networks.GRID[0]
            return v

    network = STDiT3(networks.STDIT)
    predict(network, latents(1), Spy())
    assert blocks == list(range(networks.STDIT.depth))


def test_streamed_blocks_leave_their_values_behind(model: ModelFolder, network: STDiT3) -> None:
    resident, streamed = CapturedValues(), CapturedValues()
    expected = predict(network, latents(1), resident.capture(500.0))
    other, source = stream_transformer(model, mx.float32)
    with BlockStream(source, 1, cyclic=True) as blocks:
        context = Hooks(blocks)
        out = predict(other, latents(1), streamed.capture(500.0), context=context)
        assert mx.array_equal(out, expected)
        shared = predict(other, latents(2), streamed.reuse(500.0), context=context)
    assert mx.array_equal(shared, predict(network, latents(2), resident.reuse(500.0)))


def test_merged_frames_share_with_merged_frames(network: STDiT3) -> None:
    kept, merged = CapturedValues(), Hooks[BlockPair](token_merging=PairedFrames())
    plain = predict(network, latents(1), kept.capture(500.0), context=merged)
    assert mx.array_equal(predict(network, latents(1), kept.reuse(500.0), context=merged), plain)
    assert kept.nbytes == captured_bytes(networks.STDIT, networks.GRID, 1, 4) // 2
