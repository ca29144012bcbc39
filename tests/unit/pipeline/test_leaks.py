"""Nothing of a run stays behind: no memory, and the caller's random numbers are as without it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.runtime.events import RunPlanned
from mlx_sora.text.tokenizer import Tokenizer
from tests.helpers.mixed_runs import bytes_in_use, kinds_of_runs


def test_runs_of_every_kind_leave_memory_and_random_numbers_alone(
    pipe: Pipeline, tmp_path: Path
) -> None:
    kinds = kinds_of_runs(pipe, tmp_path)
    mx.random.seed(7)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(7)
    used, runs = [], 0
    for _ in range(2):  # the first round compiles kernels and fills caches
        runs = sum(make() for make in kinds.values())
        used.append(bytes_in_use())
    assert mx.random.uniform(shape=(4,)).tolist() == expected
    if used[0] is not None and used[1] is not None:
        assert used[1] - used[0] < runs * 20_000


def test_prompts_of_a_batch_take_little_memory(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer for each took 13 MB."""
    loaded = list[object]()
    load = Tokenizer.load
    monkeypatch.setattr(Tokenizer, "load", lambda path: loaded.append(path) or load(path))
    batch = [
        GenerationRequest(f"circle {i}", steps=1, num_frames=1, seed=i, ci_dl=bool(i % 2))
        for i in range(100)
    ]
    pipe.plan(batch[0])
    before = bytes_in_use() or 0
    tracemalloc.start()
    events = pipe.stream_all(batch)
    assert isinstance(next(events), RunPlanned)  # all are prepared
    in_python, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    in_c = (bytes_in_use() or 0) - before
    events.close()
    assert len(loaded) <= 1
    assert max(in_python, in_c) < len(batch) * 40_000
