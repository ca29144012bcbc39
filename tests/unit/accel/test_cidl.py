"""Streamed blocks: order of reading, memory, and the number of resident blocks."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora.accel.cidl import SLOTS, BlockStream
from mlx_sora.loading.blocks import BlockSource
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_text_encoder, stream_text_encoder, stream_transformer
from mlx_sora.memory.limits import release
from mlx_sora.memory.residency import MemorySample, Residency
from mlx_sora.models.stdit3 import BlockPair, STDiT3
from tests.helpers import networks
from tests.helpers.block_reader import Log, no_loader_left, t5
from tests.helpers.tolerance import on_real_gpu

DEPTH = networks.T5.num_layers


def os_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def settle(reader: Log, count: int) -> list[int]:
    """Return the blocks read after time enough for more than `count`."""
    deadline = time.monotonic() + 2
    while len(reader.blocks) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    return reader.blocks


def test_blocks_are_read_once_per_pass_in_order_by_one_other_thread(model: ModelFolder) -> None:
    network, source, reader = t5(model)
    with no_loader_left(), BlockStream(source) as blocks:
        networks.t5_states(network, blocks)
        networks.t5_states(network, blocks)
        assert reader.threads == {"load text encoder"}
    assert reader.blocks == [*range(DEPTH)] * 2
    assert blocks.stats.loads == 2 * DEPTH
    assert blocks.stats.nbytes == 2 * sum(source.disk_bytes)


def test_never_more_than_one_block_ahead(model: ModelFolder) -> None:
    _, source, reader = t5(model)
    with BlockStream(source) as blocks:
        for index in range(DEPTH):
            blocks.get(index)
            expected = min(DEPTH, index + SLOTS)
            assert settle(reader, expected) == [*range(expected)]
            blocks.release(index, mx.zeros(1))


def test_without_prefetch_blocks_are_read_on_request(model: ModelFolder) -> None:
    _, source, reader = t5(model)
    with BlockStream(source, cyclic=True, prefetch=False) as blocks:
        for index in range(DEPTH):
            assert reader.blocks == [*range(index)]
            blocks.get(index)
            assert settle(reader, index + 1) == [*range(index + 1)]
            blocks.release(index, mx.zeros(1))


@pytest.mark.parametrize("cyclic", [True, False])
def test_next_pass_is_prefetched_only_if_cyclic(model: ModelFolder, cyclic: bool) -> None:
    network, source, reader = t5(model)
    with BlockStream(source, cyclic=cyclic) as blocks:
        networks.t5_states(network, blocks)
        ahead = [0, 1] if cyclic else []
        assert settle(reader, DEPTH + len(ahead)) == [*range(DEPTH), *ahead]


def test_resident_blocks_are_read_once_and_evenly_spaced(model: ModelFolder) -> None:
    network, source, reader = t5(model)
    with BlockStream(source, 2, cyclic=True) as blocks:
        assert blocks.resident == {0, 2}
        for _ in range(3):
            networks.t5_states(network, blocks)
    assert reader.blocks[: DEPTH + 6] == [*range(DEPTH), 1, 3, 4, 1, 3, 4]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("resident", [0, 1, 2])
def test_shallow_networks(tmp_path: Path, depth: int, resident: int) -> None:
    model = networks.t5_model(tmp_path, replace(networks.T5, num_layers=depth))
    expected = networks.t5_states(load_text_encoder(model, mx.float32)[0])
    network, source, _ = t5(model)
    with BlockStream(source, resident, cyclic=True) as blocks:
        for _ in range(3):
            assert mx.array_equal(networks.t5_states(network, blocks), expected)


def test_blocks_can_be_requested_in_any_order(model: ModelFolder) -> None:
    """An interrupted pass, another from its beginning, and jumps."""
    _, source, _ = t5(model)
    with BlockStream(source, 1, cyclic=True) as blocks:
        for index in [0, 1, 0, 1, 2, 4, 3, 3, 0]:
            block = blocks.get(index)
            assert block.layer[1].DenseReluDense.wo.weight.size > 0
            blocks.release(index, mx.zeros(1))


def test_a_block_without_weights_cannot_compute(model: ModelFolder) -> None:
    text, _, source = stream_text_encoder(model, mx.float32)
    video, _ = stream_transformer(model, mx.float32)
    with BlockStream(source, DEPTH) as blocks:
        networks.t5_states(text, blocks)
    with pytest.raises((ValueError, ZeroDivisionError)):
        networks.t5_states(text)
    x = mx.zeros((1, 3, networks.T5.d_model))
    for block in text.encoder.block[1:]:
        with pytest.raises(ValueError, match=r"."):
            block(x, mx.zeros(1))
    with pytest.raises(ValueError, match=r"."):
        next(networks.steps(video))


# Memory.


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A model with blocks of 3.7 MB, far above the activations of a few tokens."""
    root = tmp_path_factory.mktemp("wide")
    return networks.stdit_model(root, replace(networks.STDIT, hidden_size=160, depth=6))


def peak_of_a_step(
    network: STDiT3, source: BlockSource[BlockPair], resident: int, prefetch: bool = True
) -> int:
    """Return MLX's peak at the third step, above the network without its blocks."""
    with BlockStream(source, resident, cyclic=True, prefetch=prefetch) as blocks:
        run = networks.steps(network, blocks, count=3)
        next(run)
        base = mx.get_active_memory() - sum(
            source.nbytes[i] for i in range(len(source)) if i in blocks.resident
        )
        next(run)
        mx.reset_peak_memory()
        next(run)
        return mx.get_peak_memory() - base


@pytest.mark.skipif(on_real_gpu(), reason="a GPU library's workspace counts as MLX's")
def test_memory_holds_two_streamed_blocks_and_the_resident_ones(wide: ModelFolder) -> None:
    network, source = stream_transformer(wide, mx.float32)
    block = max(source.nbytes)
    assert block > 3 << 20
    activations = peak_of_a_step(network, source, 0, prefetch=False) - block
    assert activations < block
    for resident in range(4):
        peak = peak_of_a_step(network, source, resident)
        assert peak <= (resident + 2) * block + activations + block // 10


def test_closing_the_stream_frees_the_weights(wide: ModelFolder) -> None:
    release()
    before = mx.get_active_memory()
    network, source = stream_transformer(wide, mx.float32)
    with BlockStream(source, 6, cyclic=True) as blocks:
        for _ in networks.steps(network, blocks):
            pass
        assert mx.get_active_memory() - before > sum(source.nbytes)
    assert mx.get_active_memory() - before < max(source.nbytes)
    assert mx.get_active_memory() > before  # the network without its blocks
    del network, source, blocks, _
    release()
    # MLX may keep a constant of a compiled function.
    assert mx.get_active_memory() <= before + 64


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_twenty_runs_leave_no_thread_and_no_memory(wide: ModelFolder) -> None:
    def run() -> None:
        network, source = stream_transformer(wide, mx.float32)
        with BlockStream(source, 2, cyclic=True) as blocks:
            for _ in networks.steps(network, blocks, count=1):
                pass

    def measure() -> tuple[int, int, int]:
        release()
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return os_threads(), mx.get_active_memory(), rss

    for _ in range(3):
        run()
    threads, active, rss = measure()
    for _ in range(20):
        run()
    after = measure()
    assert after[0] <= threads
    assert after[1] <= active
    # The heap grows once by up to 13 MB; less than one block a run.
    assert after[2] < rss + (24 << 20)


# The number of resident blocks.


def scripted(samples: list[MemorySample], budget: int) -> tuple[Residency, list[MemorySample]]:
    """Return a Residency that sees `samples` in turn (start, first block, second block)."""
    left = list(samples)
    return Residency(budget, sample=lambda: left.pop(0)), left


def test_two_blocks_are_measured_alone_before_others_stay(model: ModelFolder) -> None:
    _, source, reader = t5(model)
    small, size, loading = min(source.nbytes), max(source.nbytes), source.load_peak_bytes
    work, growth, outside = 5000, 700, 300
    policy, left = scripted(
        [
            MemorySample(0, 0, 0),
            MemorySample(active=1000 + small, peak=work + small, non_mlx=0),
            MemorySample(active=1000 + small + growth, peak=work + small, non_mlx=outside),
        ],
        budget=work + (DEPTH - 2) * growth + outside + size + loading + 2 * size + 10,
    )
    with BlockStream(source, policy, cyclic=True) as blocks:
        for index in (0, 1):
            blocks.get(index)
            assert settle(reader, index + 1) == [*range(index + 1)]
            blocks.release(index, mx.zeros(1))
        assert not left
        assert blocks.resident == {0, 2}
        for _ in range(2):
            for index in range(2, DEPTH):
                blocks.get(index)
                blocks.release(index, mx.zeros(1))
            for index in range(2):
                blocks.get(index)
                blocks.release(index, mx.zeros(1))
    assert reader.blocks[:9] == [0, 1, 2, 3, 4, 0, 1, 3, 4]


def test_remeasure_frees_all_blocks_first(model: ModelFolder) -> None:
    network, source, reader = t5(model)
    everything = 100 * sum(source.nbytes)
    held: list[int] = []

    def read() -> MemorySample:
        held.append(sum(b.layer[0].SelfAttention.q.weight.size > 0 for b in source.blocks))
        return MemorySample(0, max(source.nbytes), 0)

    policy = Residency(everything, sample=read)
    with BlockStream(source, policy, cyclic=True) as blocks:
        networks.t5_states(network, blocks)
        networks.t5_states(network, blocks)
        assert reader.blocks == [*range(DEPTH), 0]
        policy.budget = 0
        blocks.remeasure()
        networks.t5_states(network, blocks)
        assert blocks.resident == frozenset()
        assert held == [0, 1, 1] * 2
        networks.t5_states(network, blocks)
    # With no room even for two blocks nothing is read ahead.
    assert reader.blocks == [*range(DEPTH), 0, *range(DEPTH), *range(DEPTH)]


def test_a_single_pass_has_no_resident_blocks(model: ModelFolder) -> None:
    network, source, _ = t5(model)
    with BlockStream(source, Residency(1 << 40)) as blocks:
        networks.t5_states(network, blocks)
        assert blocks.resident == frozenset()
