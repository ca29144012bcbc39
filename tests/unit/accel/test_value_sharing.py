"""Value sharing: values are captured unchanged, reused by flow time, and counted."""

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
from tests.helpers.tolerance import rounding


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


def test_capture_changes_nothing(network: STDiT3) -> None:
    captured = CapturedValues()
    assert mx.array_equal(
        predict(network, latents(1), captured.capture(500.0)), predict(network, latents(1), None)
    )
    assert captured.evaluations == 1


def test_captured_bytes_are_known_in_advance(network: STDiT3) -> None:
    captured = CapturedValues()
    for t in (900.0, 800.0):
        predict(network, latents(1), captured.capture(t))
    assert captured.nbytes == captured_bytes(networks.STDIT, networks.GRID, 2, 4) > 0


def test_reuse_of_own_values_is_exact(network: STDiT3) -> None:
    captured = CapturedValues()
    plain = predict(network, latents(1), captured.capture(500.0))
    assert mx.array_equal(predict(network, latents(1), captured.reuse(500.0)), plain)


def test_reuse_of_other_values_changes_the_output(network: STDiT3) -> None:
    captured = CapturedValues()
    predict(network, latents(1), captured.capture(500.0))
    shared = predict(network, latents(2), captured.reuse(500.0))
    assert mx.abs(shared - predict(network, latents(2), None)).max().item() > 1e-2


def test_reuse_covers_both_predictions_of_cfg(network: STDiT3) -> None:
    captured = CapturedValues()
    predict(network, latents(1), captured.capture(500.0))
    both = predict(network, latents(2, batch=2), captured.reuse(500.0))
    alone = predict(network, latents(2), captured.reuse(500.0))
    assert mx.allclose(both[:1], alone, rtol=0, atol=rounding(1e-4))
    plain = predict(network, latents(2, batch=2), None)
    assert mx.abs(both[1:] - plain[1:]).max().item() > 1e-2


def test_reuse_takes_the_nearest_time() -> None:
    captured = CapturedValues()
    for t in (900.0, 800.0, 600.0):
        captured.capture(t).values(mx.full((1, 1, 1, 1), t), 0)
    asked = {1000.0: 900.0, 900.0: 900.0, 830.0: 800.0, 650.0: 600.0, 0.0: 600.0}
    for t, nearest in asked.items():
        policy = captured.reuse(t)
        assert policy is not None
        assert policy.values(mx.zeros((1, 1, 1, 1)), 0).item() == nearest


def test_reuse_without_values_is_none() -> None:
    assert CapturedValues().reuse(500.0) is None


def test_capture_covers_spatial_blocks_only() -> None:
    """There is one entry per spatial block and none of temporal blocks."""
    blocks: list[int] = []

    class Spy:
        def values(self, v: mx.array, block: int) -> mx.array:
            blocks.append(block)
            assert v.shape[0] == networks.GRID[0]
            return v

    network = STDiT3(networks.STDIT)
    predict(network, latents(1), Spy())
    assert blocks == list(range(networks.STDIT.depth))


def test_capture_outlives_streamed_blocks(model: ModelFolder, network: STDiT3) -> None:
    resident, streamed = CapturedValues(), CapturedValues()
    expected = predict(network, latents(1), resident.capture(500.0))
    other, source = stream_transformer(model, mx.float32)
    with BlockStream(source, 1, cyclic=True) as blocks:
        context = Hooks(blocks)
        out = predict(other, latents(1), streamed.capture(500.0), context=context)
        assert mx.array_equal(out, expected)
        shared = predict(other, latents(2), streamed.reuse(500.0), context=context)
    assert mx.array_equal(shared, predict(network, latents(2), resident.reuse(500.0)))


def test_capture_works_with_merged_frames(network: STDiT3) -> None:
    captured, merged = CapturedValues(), Hooks[BlockPair](token_merging=PairedFrames())
    plain = predict(network, latents(1), captured.capture(500.0), context=merged)
    assert mx.array_equal(
        predict(network, latents(1), captured.reuse(500.0), context=merged), plain
    )
    assert captured.nbytes == captured_bytes(networks.STDIT, networks.GRID, 1, 4) // 2
