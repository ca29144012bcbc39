"""Limits of a stage: MLX's cache, wired memory, and the errors that a GPU reports late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.errors import MemoryBudgetError
from mlx_sora.loading.model_folder import find_model
from mlx_sora.memory.plan import StagePlan
from mlx_sora.pipeline import networks
from mlx_sora.pipeline.networks import NetworkLoader

PLAN = StagePlan(
    "denoise",
    *(0, 0, 0),
    cache_limit=123 << 20,
    memory_limit=3 << 30,
    throttled=False,
    blocks=4,
    resident=4,
)
LOADER = NetworkLoader(find_model("shapes"), mx.float32)


@pytest.mark.parametrize("loader", [LOADER, replace(LOADER, budget=4 << 30, streamed=True)])
def test_the_cache_limit_is_that_of_the_plan(loader: NetworkLoader) -> None:
    before = mx.set_cache_limit(1 << 30)
    with loader.stage(PLAN):
        assert mx.set_cache_limit(PLAN.cache_limit) == PLAN.cache_limit
    assert mx.set_cache_limit(before) == 1 << 30


@pytest.mark.parametrize(("resident", "wired"), [(4, [3 << 30]), (3, []), (0, [])])
def test_memory_is_wired_where_all_blocks_are_resident(
    monkeypatch: pytest.MonkeyPatch, resident: int, wired: list[int]
) -> None:
    asked = list[int]()

    @contextmanager
    def wire(nbytes: int) -> Iterator[None]:
        asked.append(nbytes)
        yield

    monkeypatch.setattr(networks, "wired_memory", wire)
    for plan in (replace(PLAN, resident=resident), replace(PLAN, blocks=0, resident=0)):
        with LOADER.stage(plan):
            pass
    assert asked == wired


def test_an_error_of_the_gpu_belongs_to_the_stage_that_caused_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MLX stores it, and throws it at the next use of the stream."""

    def stored() -> None:
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory.")

    monkeypatch.setattr(mx, "synchronize", stored)
    with pytest.raises(MemoryBudgetError, match="Stage denoise: out of memory"), LOADER.stage(PLAN):
        pass


def test_the_temporal_decoder_is_streamed_within_the_least_budget(pipe: Pipeline) -> None:
    """And makes the same frames as the whole one, in as small batches."""
    options = {"prompt": "a red circle", "seed": 1, "steps": 1, "num_frames": 17}
    least = pipe.plan(GenerationRequest.from_dict(options)).smallest
    streamed, whole = (pipe(**options, memory_budget=str(n)) for n in (least, least + 2_000_000))  # type: ignore[arg-type]
    assert np.array_equal(streamed.frames, whole.frames)  # type: ignore[arg-type]
    done, other = (video.metadata["accelerations"]["ci_dl"] for video in (streamed, whole))
    assert "decode" not in other
    assert (done["decode"]["blocks"], done["decode"]["loads"]) == (7, 7)
