"""Signs of progress of a rank that others wait for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.distributed.group import Ranks
from mlx_sora.pipeline import run as run_module
from mlx_sora.pipeline.pipeline import last_video

STEPS = 3


class Signs:
    """A watchdog that records what this rank shows the others."""

    def __init__(self) -> None:
        self.ticks, self.scopes, self.patience = 0, 0, list[tuple[float, float]]()

    def tick(self) -> None:
        self.ticks += 1

    def allow_silence(self, idle: float, busy: float) -> None:
        self.patience.append((idle, busy))

    @contextmanager
    def scope(self) -> Iterator[None]:
        self.scopes += 1
        yield


def make(pipe: Pipeline, **options: object) -> Signs:
    signs = Signs()
    watched = Pipeline(pipe.model)
    watched.engine = replace(pipe.engine, ranks=Ranks(watchdog=signs))  # type: ignore[arg-type]
    request = GenerationRequest.from_dict(
        {"prompt": "a red circle", "seed": 1, "steps": STEPS, "num_frames": 34, **options}
    )
    last_video(watched.stream(request))
    return signs


@pytest.mark.parametrize("streamed", [False, True])
def test_long_passes_are_signed_block_by_block(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    monkeypatch.setattr(run_module, "on_gpu", lambda: False)
    plain = make(pipe, ci_dl=streamed)
    monkeypatch.setattr(run_module, "on_gpu", lambda: True)
    assert make(pipe, ci_dl=streamed).ticks == plain.ticks, "passes of a tiny model are short"
    monkeypatch.setattr(run_module, "SLOWEST_GPU", 1e6)
    blocks = pipe.engine.transformer_config.depth
    assert make(pipe, ci_dl=streamed).ticks == plain.ticks + STEPS * blocks


@pytest.mark.parametrize("gpu", [False, True])
def test_the_patience_of_others_follows_the_plan(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    """Processor time shows that a CPU is alive, but not that a rank comes to an end."""
    monkeypatch.setattr(run_module, "on_gpu", lambda: gpu)
    plan = pipe.plan(GenerationRequest("a red circle", seed=1, steps=STEPS, num_frames=34))
    encode, denoise, decode = (plan.stage(name) for name in ("encode", "denoise", "decode"))
    expected = [encode.flops, denoise.flops / STEPS / denoise.blocks, decode.flops / 2]
    assert denoise.blocks == pipe.engine.transformer_config.depth
    patience = make(pipe).patience
    speed = run_module.SLOWEST_GPU if gpu else run_module.SLOWEST_CPU
    assert [busy for _, busy in patience[::2]] == pytest.approx([n / speed for n in expected])
    assert all(idle == (busy if gpu else 0.0) for idle, busy in patience)
    assert set(patience[1::2]) == {(0.0, 0.0)}


def test_errors_of_a_rank_for_itself_do_not_end_the_others(pipe: Pipeline) -> None:
    signs = Signs()
    ranks = Ranks(watchdog=signs)  # type: ignore[arg-type]
    ranks.size = 2
    watched = Pipeline(pipe.model)
    watched.engine = replace(pipe.engine, ranks=ranks)
    request = GenerationRequest("a red circle", seed=1, steps=1, num_frames=1, parallel="off")
    last_video(watched.stream(request))
    assert [type(event).__name__ for event in watched.stream_all([request])][-1] == "Finished"
    assert signs.scopes == 0
