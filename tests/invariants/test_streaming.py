"""Streamed equals resident, bit for bit, for every network, at every residency."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx import nn

from mlx_sora.accel.cidl import BlockStream
from mlx_sora.accel.tdtm import MergedSites
from mlx_sora.loading.checkpoint import Checkpoint, load_weights
from mlx_sora.loading.model_folder import ModelFolder, find_model
from mlx_sora.loading.networks import (
    load_text_encoder,
    load_transformer,
    load_vae,
    stream_text_encoder,
    stream_transformer,
)
from mlx_sora.memory.limits import release
from mlx_sora.memory.plan import StagePlan
from mlx_sora.memory.residency import MemorySample, Residency, evenly_spaced
from mlx_sora.models.hooks import TokenMerging
from mlx_sora.models.key_map import KeyMap
from mlx_sora.models.vae import VAEConfig, VideoVAE
from mlx_sora.models.vae_spatial import SpatialVAEConfig
from mlx_sora.models.vae_temporal import TemporalVAEConfig
from mlx_sora.pipeline.networks import load_decoder
from mlx_sora.request.techniques import PAPER_SITES
from tests.helpers import networks

#: Two frames attend as one; an odd last frame alone.
MERGING = MergedSites(PAPER_SITES, range(networks.STDIT.depth))

PREFETCH = pytest.mark.parametrize("prefetch", [True, False], ids=["prefetch", "serial"])


@pytest.fixture(scope="module")
def states(model: ModelFolder) -> mx.array:
    return networks.t5_states(load_text_encoder(model, mx.float32)[0])


@PREFETCH
@pytest.mark.parametrize("resident", range(networks.T5.num_layers + 2))
def test_t5(model: ModelFolder, states: mx.array, resident: int, prefetch: bool) -> None:
    network, _, source = stream_text_encoder(model, mx.float32)
    with BlockStream(source, resident, cyclic=True, prefetch=prefetch) as blocks:
        for _ in range(3):
            assert mx.array_equal(networks.t5_states(network, blocks), states)
    assert mx.abs(states).max() > 0.1


def test_t5_embedding_rows_come_along(model: ModelFolder) -> None:
    _, whole = load_text_encoder(model, mx.float32)
    _, rows, _ = stream_text_encoder(model, mx.float32)
    assert mx.array_equal(rows([3, 0, 39]), whole([3, 0, 39]))


CASES: dict[str, tuple[TokenMerging | None, bool]] = {
    "plain": (None, False),
    "merged": (MERGING, False),
    "merged, x_mask": (MERGING, True),
}


@pytest.fixture(scope="module")
def predictions(model: ModelFolder) -> dict[str, list[mx.array]]:
    whole = load_transformer(model, mx.float32)
    return {
        name: list(networks.steps(whole, None, tokens, masked=masked))
        for name, (tokens, masked) in CASES.items()
    }


@PREFETCH
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("resident", range(networks.STDIT.depth + 1))
def test_stdit3(
    model: ModelFolder,
    predictions: dict[str, list[mx.array]],
    resident: int,
    case: str,
    prefetch: bool,
) -> None:
    tokens, masked = CASES[case]
    network, source = stream_transformer(model, mx.float32)
    with BlockStream(source, resident, cyclic=True, prefetch=prefetch) as blocks:
        found = list(networks.steps(network, blocks, tokens, masked=masked))
    assert len(found) == 2
    for a, b in zip(found, predictions[case], strict=True):
        assert mx.array_equal(a, b)
        assert 0.1 < mx.abs(a).max() < 1e4


def test_the_cases_differ(predictions: dict[str, list[mx.array]]) -> None:
    plain, merged, masked = (predictions[name][0] for name in CASES)
    assert not mx.allclose(plain, merged)
    assert not mx.allclose(merged, masked)


@pytest.mark.parametrize("kept", [0, 1, 2, networks.STDIT.depth])
def test_stdit3_with_measured_residency_that_is_reconsidered(model: ModelFolder, kept: int) -> None:
    expected = list(networks.steps(load_transformer(model, mx.float32), count=4))
    network, source = stream_transformer(model, mx.float32)
    work, size = 1000, max(source.nbytes)
    room = kept * size + (0 if kept == len(source) else size + source.load_peak_bytes)
    policy = Residency(
        work + room,
        sample=lambda: MemorySample(active=0, peak=work + size, non_mlx=0),
    )
    found = []
    with BlockStream(source, policy, cyclic=True) as blocks:
        for step, out in enumerate(networks.steps(network, blocks, count=4)):
            found.append(out)
            assert len(blocks.resident) == kept
            if step == 1:
                policy.budget = 2 * size + work
                kept = 0
                blocks.remeasure()
    assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("stored", [mx.float32, mx.float16, mx.bfloat16])
def test_types_are_cast_as_in_whole_networks(
    tmp_path: Path, stored: mx.Dtype, dtype: mx.Dtype
) -> None:
    model = networks.stdit_model(tmp_path, dtype=stored)
    (expected,) = networks.steps(load_transformer(model, dtype), count=1)
    network, source = stream_transformer(model, dtype)
    with BlockStream(source, 1) as blocks:
        (found,) = networks.steps(network, blocks, count=1)
    assert mx.array_equal(found, expected)


def test_two_streams_at_once(model: ModelFolder, predictions: dict[str, list[mx.array]]) -> None:
    """Two runs of one process, step by step in turn, with different work and residencies."""
    (first, source), (second, other) = (stream_transformer(model, mx.float32) for _ in range(2))
    with BlockStream(source, 1, cyclic=True) as a, BlockStream(other, 3, cyclic=True) as b:
        runs = zip(networks.steps(first, a, MERGING), networks.steps(second, b), strict=True)
        for step, (x, y) in enumerate(runs):
            assert mx.array_equal(x, predictions["merged"][step])
            assert mx.array_equal(y, predictions["plain"][step])


def lazy_vae(root: Path) -> tuple[VideoVAE, VideoVAE]:
    """The same random decoder twice, its weights (0.7 MB temporal) still on disk."""
    config = VAEConfig(
        spatial=SpatialVAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4),
        temporal=TemporalVAEConfig(
            filters=16, num_res_blocks=1, channel_multipliers=(1, 1, 2, 2), num_groups=4
        ),
    )
    first, second = (VideoVAE(config, ("decoder",)) for _ in range(2))
    mx.save_safetensors(str(root / "model.safetensors"), networks.random_weights(first, 6))
    for network in (first, second):
        load_weights(network, Checkpoint.open(root), KeyMap())
    return first, second


@PREFETCH
@pytest.mark.parametrize("resident", [0, 2])
def test_temporal_decoder(monkeypatch: pytest.MonkeyPatch, resident: int, prefetch: bool) -> None:
    model = find_model("shapes")
    z = mx.random.normal((1, 10, 2, 3, 4), key=mx.random.key(7))
    expected = list(load_vae(model).decode_chunks(z, 34))
    plan = StagePlan("decode", 0, 0, 0, 0, 0, False, 7, resident, prefetch, sequential_offload=True)
    streams, held, release_block = list[BlockStream[nn.Module]](), list[int](), BlockStream.release

    def watch(stream: BlockStream[nn.Module], index: int, output: mx.array) -> None:
        mx.eval(output)
        held.append(mx.get_active_memory())
        release_block(stream, index, output)

    monkeypatch.setattr(BlockStream, "release", watch)
    release()
    before = mx.get_active_memory()
    vae, open_blocks = load_decoder(model, mx.float32, plan, lambda _, each: streams.append(each))
    found = list(vae.decode_chunks(z, 34, sequential_offload=True, open_blocks=open_blocks))
    assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    (stream,) = streams
    sizes = stream.source.nbytes
    assert stream.stats.loads == 2 * 7 - resident
    kept = sum(sizes[i] for i in evenly_spaced(7, resident))
    work = 1 << 18  # of the layers before and after, and activations
    streamed = stream.source.load_peak_bytes + prefetch * max(sizes)
    assert max(held) - before < work + kept + streamed
    assert resident or work + streamed < sum(sizes)


def test_vae_networks_in_turn(tmp_path: Path) -> None:
    whole, vae = lazy_vae(tmp_path)
    z = mx.random.normal((1, 10, 2, 3, 4), key=mx.random.key(7))
    expected = list(whole.decode_chunks(z, 34))
    spatial = sum(value.nbytes for value in networks.leaves(vae.spatial_vae).values())
    temporal = sum(value.nbytes for value in networks.leaves(vae.temporal_vae).values())
    release()
    before = mx.get_active_memory()
    chunks = vae.decode_chunks(z, 34, sequential_offload=True)
    found = [next(chunks)]
    held = mx.get_active_memory() - before - found[0].nbytes
    assert spatial <= held < spatial + temporal // 2
    found += chunks
    assert len(found) == 2
    assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[0].shape == (17, 4, 6, 3)
