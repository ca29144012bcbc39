"""A pipeline that draws grey frames at once, so that the command line is tested without a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sora.errors import MlxSoraError
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.events import (
    Event,
    Finished,
    PreviewReady,
    RequestFailed,
    RequestStarted,
    StageFinished,
    StageProgress,
    StageStarted,
    StepFinished,
    Warned,
)
from mlx_sora.video import Video
from mlx_sora.video.metadata import build_metadata
from mlx_sora.video.output_path import output_path
from mlx_sora.video.writer import open_writer, write_sidecar

SIDE, FRAMES = 16, 17


class FakePipeline:
    """Emits what a real run emits and writes a real file; `failure` is raised while it writes."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.failure = failure
        self.requests: list[GenerationRequest] = []
        self.runs: list[Iterator[Event]] = []
        self.loaded: list[tuple[str | None, str]] = []

    def load(self, model: str | None, dtype: str) -> FakePipeline:
        self.loaded.append((model, dtype))
        return self

    def info(self) -> dict[str, Any]:
        return {
            "model": "fake",
            "transformer": {"parameters": 1234567, "bytes": 2469134},
            "device": {"total_memory": 8_000_000_000, "metal": False},
        }

    def hash_weights(self, requests: Sequence[GenerationRequest]) -> Iterator[Event]:
        return iter(())

    def stream(self, request: GenerationRequest, resume: str | None = None) -> Iterator[Event]:
        self.requests.append(request)
        self.runs.append(self._run(request))
        return self.runs[-1]

    def stream_all(self, requests: Sequence[GenerationRequest]) -> Iterator[Event]:
        for index, request in enumerate(requests):
            yield RequestStarted(index, len(requests), request.prompt, request.seed or 0)
            try:
                yield from self.stream(request)
            except MlxSoraError as error:
                yield RequestFailed(index, error)

    def _run(self, request: GenerationRequest) -> Iterator[Event]:
        yield StageStarted("encode", 1)
        yield StageFinished("encode", 0.25, 1_500_000, 90_000_000)
        for level in ("info", "warning", "error"):
            getattr(logging.getLogger("mlx_sora.fake"), level)("log of level %s", level)
        yield StageStarted("denoise", 2)
        for step in range(2):
            yield StepFinished(step, 2, 1000.0 - 500 * step, 0.125, mx.zeros((1, 5, 2, 2, 4)))
        yield PreviewReady(1, np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8))
        yield Warned("this is a fake")
        yield StageFinished("denoise", 0.5, 3_000_000, 95_000_000)
        yield from self._decode(request)

    def _decode(self, request: GenerationRequest) -> Iterator[Event]:
        frames = FRAMES if request.num_frames is None else int(request.num_frames)
        seed = request.seed or 0
        settings = {"model": "fake", "seed": seed, "steps": request.steps or 2, "sampler": "rflow"}
        record = build_metadata(request, settings, warnings=["this is a fake"])
        path = output_path(str(request.output), prompt=request.prompt, seed=seed, num_frames=frames)
        yield StageStarted("decode", frames)
        with open_writer(path, SIDE, SIDE, 24, record, request.overwrite) as writer:
            writer.write(np.full((frames, SIDE, SIDE, 3), 128, np.uint8))
            if self.failure is not None:
                raise self.failure
            yield StageProgress("decode", frames, frames)
        if request.metadata:
            write_sidecar(writer.path, record, request.overwrite)
        yield StageFinished("decode", 0.75, 2_000_000, 99_000_000)
        yield Finished(
            Video(
                writer.path,
                request,
                SIDE,
                SIDE,
                frames,
                24,
                seed,
                warnings=("this is a fake",),
                timings={"encode": 0.25, "denoise": 0.5, "decode": 0.75},
                memory={"encode": 1_500_000},
                metadata=record,
            )
        )
