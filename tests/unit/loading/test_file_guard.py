"""Weights that change, vanish or cannot be read while a run reads them."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import Pipeline
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.errors import WeightsError
from mlx_sora.loading import file_guard
from mlx_sora.loading.checkpoint import Checkpoint
from mlx_sora.loading.file_guard import WeightFileGuard, eval_parameters
from mlx_sora.loading.model_folder import ModelFolder, find_model
from mlx_sora.loading.networks import load_transformer, stream_transformer
from mlx_sora.loading.safetensors import TensorInfo, load_tensors
from mlx_sora.memory import limits
from mlx_sora.memory.plan import StagePlan
from mlx_sora.memory.planner import stage_limits
from mlx_sora.models.stdit3 import STDiT3
from mlx_sora.runtime.device import to_numpy
from tests.helpers.threads import in_thread

PROMPT = "a red circle moving right on a black background"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_guard, "RETRY_DELAYS", (0.0, 0.0))


@pytest.fixture(autouse=True)
def fresh_throttling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Throttling as in a process in which no read has failed yet."""
    limit = mx.get_memory_limit()
    monkeypatch.setattr(limits, "_throttling_stopped", threading.Event())
    yield
    mx.set_memory_limit(limit)


@pytest.fixture
def model(tmp_path: Path) -> ModelFolder:
    return ModelFolder.open(shutil.copytree(find_model("shapes").path, tmp_path / "model"))


def last_file(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def rewrite(file: Path) -> None:
    """The same bytes, in place: what MLX has read of it and what it will may not fit together."""
    content = file.read_bytes()
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))


def exchange(file: Path) -> None:
    """Another file under its name, as a download puts it there."""
    other = file.with_name("other")
    other.write_bytes(b"x")
    other.replace(file)


def read_while(model: ModelFolder, harm: Callable[[Path], None]) -> STDiT3:
    """The transformer, read after its file has come to harm."""
    with WeightFileGuard(model.transformer).check_reads():
        network = load_transformer(model, mx.float32)
        harm(last_file(model.transformer))
        eval_parameters(network)
    return network


@pytest.mark.parametrize("harm", [truncate, rewrite])
def test_what_is_rewritten_in_place_is_an_error(
    model: ModelFolder, harm: Callable[[Path], None]
) -> None:
    file = last_file(model.transformer)
    with pytest.raises(WeightsError, match=f"{file.name} was rewritten"):
        in_thread(lambda: read_while(model, harm))


@pytest.mark.parametrize("harm", [exchange, Path.unlink])
def test_what_is_replaced_or_removed_is_read_as_it_was(
    model: ModelFolder, harm: Callable[[Path], None]
) -> None:
    expected = load_transformer(model, mx.float32)
    eval_parameters(expected)
    network = read_while(model, harm)
    assert mx.array_equal(network.x_embedder.proj.weight, expected.x_embedder.proj.weight)


def test_a_failed_read_in_the_main_thread_ends_throttling(model: ModelFolder) -> None:
    """MLX would wait for ever for a task that it counts wrongly since."""
    stage = StagePlan("denoise", 0, 0, 0, cache_limit=0, memory_limit=5, throttled=True)
    with stage_limits(stage):
        assert mx.get_memory_limit() == 5
        with pytest.raises(WeightsError), WeightFileGuard(model.transformer).check_reads():
            raise RuntimeError("[read] Unable to read from file.")
        assert mx.get_memory_limit() > 1 << 60
    with stage_limits(stage):
        assert mx.get_memory_limit() > 1 << 60


def test_other_errors_pass(model: ModelFolder) -> None:
    with (
        pytest.raises(RuntimeError, match="mine"),
        WeightFileGuard(model.transformer).check_reads(),
    ):
        raise RuntimeError("mine")
    with (
        pytest.raises(WeightsError, match="Cannot read the weights"),
        WeightFileGuard(model.transformer).check_reads(),
    ):
        raise RuntimeError("[read] Unable to read from file.")


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("stage", ["text_encoder", "transformer", "vae"])
def test_a_run_names_the_file_that_was_cut_while_it_was_read(
    model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, streamed: bool
) -> None:
    """The header was whole when it was opened; what no block holds is read first."""
    file = last_file(model.path / stage)

    def cutting(path: str, **more: object) -> object:
        arrays = load(path, **more)  # type: ignore[call-overload]
        if Path(path) == file:
            truncate(file)
        return arrays

    load = mx.load
    monkeypatch.setattr("mlx.core.load", cutting)
    with pytest.raises(WeightsError, match=file.name):
        in_thread(
            lambda: Pipeline(model)(
                PROMPT, steps=1, num_frames=1, output=tmp_path / "a.png", ci_dl=streamed
            )
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Flaky:
    """A reader that fails `times` times at one block, then works."""

    def __init__(self, block: int, times: int, error: Exception) -> None:
        self.block, self.left, self.error = block, times, error

    def __call__(
        self, file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None = None
    ) -> dict[str, mx.array]:
        if self.left and f"_blocks.{self.block}." in next(iter(tensors)):
            self.left -= 1
            raise self.error
        return load_tensors(file, tensors, stream)


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), RuntimeError("[read] Unable to read from file.")]
)
def test_a_read_that_fails_twice_is_tried_thrice(
    model: ModelFolder, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    reader = Flaky(1, 2, error)
    stream_all(model, reader)
    assert caplog.text.count("block 1 of the transformer") == 2
    with pytest.raises(WeightsError, match=r"Block 1 of the transformer: cannot read"):
        stream_all(model, Flaky(1, 3, error))


def stream_all(model: ModelFolder, reader: Flaky) -> None:
    """Every block once."""
    _, source = stream_transformer(model, mx.float32)
    with BlockStream(replace(source, reader=reader)) as blocks:
        for index in range(len(source)):
            blocks.get(index)
            blocks.release(index, mx.zeros(1))


def test_what_is_exchanged_while_streaming_is_named(model: ModelFolder) -> None:
    _, source = stream_transformer(model, mx.float32)
    file = last_file(model.transformer)
    status = file.stat()
    copy = Path(shutil.copy(file, file.with_name("other")))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(file)  # same size, same time: another file all the same
    with pytest.raises(WeightsError, match=f"{file.name} has changed"):
        source.load(0)


def test_embedding_rows_of_a_file_that_is_gone(model: ModelFolder, tmp_path: Path) -> None:
    from mlx_sora.loading.networks import load_text_encoder

    _, rows = load_text_encoder(model, mx.float32)
    shutil.rmtree(model.text_encoder)
    with pytest.raises(WeightsError, match="Cannot read"):
        rows([0, 1])


def test_numpy_gets_no_values_of_a_failed_read(tmp_path: Path) -> None:
    """By itself numpy takes what lies in memory."""
    file = tmp_path / "a.safetensors"
    mx.save_safetensors(str(file), {"a": mx.ones((1000, 1000))})

    def read() -> None:
        array = mx.load(str(file))["a"] + 1
        os.truncate(file, 2000)
        to_numpy(array)

    with pytest.raises(RuntimeError, match="Unable to read"):
        in_thread(read)


def test_what_no_block_holds_is_tried_thrice_too(
    model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads fail when the tensors are evaluated, not when they are loaded."""
    monkeypatch.setattr(file_guard, "RETRY_DELAYS", (0.0, 0.0))
    key, file, failures = "x_embedder.proj.bias", tmp_path / "cut.safetensors", [0]
    load = Checkpoint.load

    def failing(checkpoint: Checkpoint, keys: Iterable[str]) -> dict[str, mx.array]:
        arrays = load(checkpoint, keys)
        if key in arrays and failures[0] < 2:
            failures[0] += 1
            mx.save_safetensors(str(file), {key: mx.zeros(arrays[key].shape, arrays[key].dtype)})
            arrays |= mx.load(str(file))
            os.truncate(file, file.stat().st_size - 1)
        return arrays

    monkeypatch.setattr(Checkpoint, "load", failing)
    video = in_thread(lambda: Pipeline(model)(PROMPT, seed=1, steps=1, num_frames=1, ci_dl=True))
    assert failures == [2]
    expected = Pipeline(model)(PROMPT, seed=1, steps=1, num_frames=1)
    assert np.array_equal(video.frames, expected.frames)
