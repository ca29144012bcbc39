"""The end of streaming: closing, exceptions, Ctrl-C, and files that fail during a run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora.accel.cidl import BlockStream
from mlx_sora.errors import WeightsError
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.safetensors import TensorInfo, load_tensors
from tests.helpers import networks
from tests.helpers.block_reader import Log, loaders, no_loader_left, t5

DEPTH = networks.T5.num_layers


def test_an_exception_joins_the_thread(model: ModelFolder) -> None:
    _, source, _ = t5(model, Log(0.02))
    with no_loader_left():
        blocks = BlockStream(source, cyclic=True)
        with pytest.raises(ZeroDivisionError), blocks:
            raise ZeroDivisionError(blocks.get(0), loaders())
        with pytest.raises(RuntimeError, match="closed"):
            blocks.get(1)
        blocks.close()


def test_ctrl_c_while_waiting_for_a_block_joins_the_thread(model: ModelFolder) -> None:
    main = threading.get_ident()

    class Interrupting(Log):
        def __call__(
            self, file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None
        ) -> dict[str, mx.array]:
            if int(next(iter(tensors)).split(".")[2]) == 3:
                signal.pthread_kill(main, signal.SIGINT)
                time.sleep(0.2)
            return super().__call__(file, tensors, stream)

    network, source, reader = t5(model, Interrupting())
    started = time.monotonic()
    with no_loader_left(), pytest.raises(KeyboardInterrupt), BlockStream(source) as blocks:
        networks.t5_states(network, blocks)
    assert max(reader.blocks) <= 3
    assert time.monotonic() - started < 5


def test_closing_does_not_read_requested_blocks(model: ModelFolder) -> None:
    _, source, reader = t5(model, Log(0.05))
    with BlockStream(source, cyclic=True) as blocks:
        blocks.get(0)
        blocks.release(0, mx.zeros(1))
    assert reader.blocks in ([0], [0, 1])


def first_shard(model: ModelFolder) -> Path:
    return model.text_encoder / "model-0.safetensors"


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def rewrite(file: Path) -> None:
    """Change content and time, not the size."""
    time.sleep(0.01)
    file.write_bytes(b"x" * file.stat().st_size)


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("harm", [truncate, Path.unlink, rewrite])
def test_a_file_that_fails_during_a_run(tmp_path: Path, harm: object, resident: int) -> None:
    model = networks.t5_model(tmp_path)
    network, source, _ = t5(model)
    with no_loader_left(), BlockStream(source, resident, cyclic=True, prefetch=False) as blocks:
        networks.t5_states(network, blocks)
        harm(first_shard(model))  # type: ignore[operator]
        with pytest.raises(WeightsError) as error:
            networks.t5_states(network, blocks)
        assert loaders() == 0
        assert f"Block {1 if resident else 0} of the text encoder" in str(error.value)
        assert str(first_shard(model)) in str(error.value)
        with pytest.raises(RuntimeError, match="closed"):
            blocks.get(0)


def test_a_file_that_ends_while_it_is_read(tmp_path: Path) -> None:
    """Header and size were right just before, so MLX finds out at evaluation."""
    model = networks.t5_model(tmp_path)

    class Cutting(Log):
        def __call__(
            self, file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None
        ) -> dict[str, mx.array]:
            arrays = super().__call__(file, tensors, stream)
            if self.blocks[-1] == 4:
                truncate(file)
            return arrays

    network, source, _ = t5(model, Cutting())
    with (
        no_loader_left(),
        pytest.raises(WeightsError, match=r"Block 4 of the text encoder: .*model-1\.safet"),
        BlockStream(source) as blocks,
    ):
        networks.t5_states(network, blocks)
    # The next stream is not harmed by it.
    expected = networks.t5_model(tmp_path / "again")
    network, source, _ = t5(expected)
    with BlockStream(source) as blocks:
        networks.t5_states(network, blocks)


@pytest.mark.parametrize("failure", [OSError("disk gone"), RuntimeError("bad read")])
def test_a_failing_read_names_block_and_file(model: ModelFolder, failure: Exception) -> None:
    class Failing(Log):
        def __call__(
            self, file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None
        ) -> dict[str, mx.array]:
            if super().__call__(file, tensors, stream) and self.blocks[-1] == 2:
                raise failure
            return load_tensors(file, tensors, stream)

    network, source, _ = t5(model, Failing())
    with (
        no_loader_left(),
        pytest.raises(WeightsError, match=rf"Block 2 .*model-.*{failure}"),
        BlockStream(source) as blocks,
    ):
        networks.t5_states(network, blocks)
