"""Several requests: all text is encoded before T5 is freed, then one video after the other.

A request that fails does not stop the others. Encoded text waits on disk, so that memory does not
grow with the number of requests.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_sora.distributed.group import Ranks, deserialize_error, serialize_error
from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.memory.limits import release
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.generate import generate_clips, prepare
from mlx_sora.pipeline.locks import output_lock_on_rank0, process_lock
from mlx_sora.pipeline.planned_stages import planned_encoding, planned_stages
from mlx_sora.pipeline.resume import continue_on_ranks
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.pipeline.stages import encode_text
from mlx_sora.pipeline.transfer import VideoTransfer
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.events import (
    Event,
    Finished,
    PlannedStage,
    RequestFailed,
    RequestStarted,
    RunPlanned,
)
from mlx_sora.utils.leftovers import temporary_folder
from mlx_sora.video.output_path import OutputNames

log = logging.getLogger(__name__)


def generate_batch(
    engine: Engine, requests: Sequence[GenerationRequest]
) -> Generator[Event, None, None]:
    """Yield the events of all requests: `Finished` or `RequestFailed` for each of them.

    With data parallelism, ranks make whole videos side by side: each makes its own and sends the
    files to rank 0. That needs at least as many requests as ranks. Otherwise all ranks make every
    video together.
    """
    modes = {request.parallel for request in requests}
    ranks = engine.ranks
    if "off" in modes:  # each process for itself: its errors are no other's
        engine, ranks = engine.single_process(), Ranks()
    checkpoints = any(request.checkpoint_every is not None for request in requests)
    enough = modes == {"auto"} and len(requests) >= ranks.size and not checkpoints
    data_parallel = ranks.size > 1 and ("prompts" in modes or enough)
    return ranks.watch_events(_Batch(engine, requests, data_parallel).events())


class _Batch:
    """Several requests being carried out. data_parallel: every rank makes videos of its own."""

    def __init__(
        self, engine: Engine, requests: Sequence[GenerationRequest], data_parallel: bool
    ) -> None:
        self._engine, self._ranks, self._requests = engine, engine.ranks, requests
        self._data_parallel = data_parallel
        self._runs: dict[int, GenerationRun] = {}
        self._outputs = OutputNames()

    def events(self) -> Generator[Event, None, None]:
        self._engine.check_equal(self._requests)
        for index, request in enumerate(self._requests):
            try:
                self._runs[index] = self._prepare(request)
            except Exception as error:
                yield RequestFailed(index, as_known_error(error))
        with (
            process_lock(self._engine.model.path) as guard,
            temporary_folder() as folder,
            closing(guard.stop_at_exit(self._make_all(folder))) as stoppable,
        ):
            yield from stoppable

    def _make_all(self, folder: Path) -> Generator[Event, None, None]:
        """Make the videos of all runs. folder: for texts."""
        yield RunPlanned(tuple(self._planned_stages()))
        texts = yield from self._encode(folder)
        if self._data_parallel:
            yield from self._make_side_by_side(texts)
            return
        for index in list(self._runs):
            yield from self._make(index, self._runs.pop(index), texts.get(index))

    def _planned_stages(self) -> Iterator[PlannedStage]:
        """Yield the stages that this rank will make."""
        for group in _encoding_groups(self._runs):
            yield planned_encoding([self._runs[index] for index in group])
        ranks = self._ranks
        own = slice(ranks.rank, None, ranks.size) if self._data_parallel else slice(None)
        for index in list(self._runs)[own]:
            yield from planned_stages(self._runs[index], index)

    def _prepare(self, request: GenerationRequest) -> GenerationRun:
        """Prepare a run. Raises UsageError if another one writes to the same file."""
        ranks, engine = self._ranks, self._engine
        request = continue_on_ranks(request, ranks, engine.model.name)
        with ranks.collective_errors():
            request.validate()
            if self._data_parallel:
                request, engine = _as_single_rank(request), engine.single_process()
            run = prepare(engine, request)
            if run.output is not None:
                self._outputs.add(run.output, sidecar=request.metadata)
        run.checkpoints.share(run.ranks)
        return run

    def _encode(self, folder: Path) -> Generator[Event, None, dict[int, _TextsOnDisk]]:
        """Encode the text of all runs, in groups that one T5 can serve."""
        texts: dict[int, _TextsOnDisk] = {}
        for number, group in enumerate(_encoding_groups(self._runs)):
            store = _TextsOnDisk(folder, f"{number}-")
            yield from encode_text([self._runs[i] for i in group], store, self._ranks)
            texts |= dict.fromkeys(group, store)
        return texts

    def _make_side_by_side(self, texts: Mapping[int, _TextsOnDisk]) -> Generator[Event, None, None]:
        """Make the videos in rounds, one per rank; afterwards rank 0 collects the others'."""
        ranks, order = self._ranks, list(self._runs)
        for start in range(0, len(order), ranks.size):
            indices, transfer = order[start : start + ranks.size], VideoTransfer()
            if ranks.rank < len(indices):
                own = indices[ranks.rank]
                transfer = yield from self._make_for_transfer(own, texts[own])
            transfers = transfer.all_gather(ranks)
            for rank, (index, other) in enumerate(zip(indices, transfers, strict=False)):
                run = self._runs.pop(index)
                if rank != ranks.rank:
                    yield from self._receive(index, run, other)

    def _make_for_transfer(
        self, index: int, texts: _TextsOnDisk
    ) -> Generator[Event, None, VideoTransfer]:
        """Make a video of this rank; on other ranks than 0, into a temporary folder."""
        ranks, run = self._ranks, self._runs[index]
        run.result.metadata["parallel"] = {"ranks": ranks.size, "mode": "prompts"}
        with temporary_folder() as folder:
            if run.output is not None and not ranks.is_rank0:
                run = replace(run, output=folder / run.output.name)
            for event in self._make(index, run, texts):
                yield event
                if isinstance(event, RequestFailed):
                    return VideoTransfer(error=serialize_error(event.error))
                if isinstance(event, Finished):
                    if ranks.is_rank0:
                        return VideoTransfer()
                    return VideoTransfer.from_video(event.video, folder)
        raise AssertionError("a request ends with Finished or RequestFailed")

    def _receive(self, index: int, run: GenerationRun, transfer: VideoTransfer) -> Iterator[Event]:
        """Yield the events of a video that another rank made."""
        yield self._started(index, run)
        try:
            if transfer.error is not None:
                raise deserialize_error(*transfer.error)
            yield Finished(transfer.deliver(run, write=self._ranks.is_rank0))
        except Exception as error:
            yield RequestFailed(index, as_known_error(error))

    def _make(
        self, index: int, run: GenerationRun, texts: _TextsOnDisk | None
    ) -> Generator[Event, None, None]:
        yield self._started(index, run)
        try:
            yield from run.opening_events()
            states = {} if texts is None else {text: texts[text] for text in run.encodings}
            with output_lock_on_rank0(run.output, run.ranks):
                video = yield from generate_clips(run, states)
        except Exception as error:
            failure = as_known_error(error)
            if run.ranks.size > 1 and not getattr(error, "on_all_ranks", False):
                raise  # the other ranks are elsewhere
        else:
            yield Finished(video)
            return
        release()
        yield RequestFailed(index, failure)

    def _started(self, index: int, run: GenerationRun) -> RequestStarted:
        return RequestStarted(index, len(self._requests), run.request.prompt, run.settings.seed)


class _TextsOnDisk(MutableMapping[str, mx.array]):
    """Texts and their T5 states [n, D], each in a file of `folder` that begins with `prefix`."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix
        self._files: dict[str, Path] = {}

    def __getitem__(self, text: str) -> mx.array:
        arrays = mx.load(str(self._files[text]), format="safetensors")
        states: mx.array = arrays["states"]  # type: ignore[call-overload, assignment]
        mx.eval(states)
        return states

    def __setitem__(self, text: str, states: mx.array) -> None:
        name = f"{self._prefix}{len(self._files)}.safetensors"
        file = self._files.setdefault(text, self._folder / name)
        try:
            mx.save_safetensors(str(file), {"states": states})
        except RuntimeError as error:  # MLX's error for a disk that is full or gone
            raise MlxSoraError(
                f"Cannot write {file}: {error}", "Make room there, or set TMPDIR to another folder."
            ) from error

    def __delitem__(self, text: str) -> None:
        self._files.pop(text).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def as_known_error(error: Exception) -> MlxSoraError:
    """Return an error as one of ours, without its traceback, whose frames hold networks."""
    log.debug("a request failed", exc_info=error)
    if isinstance(error, MlxSoraError):
        return type(error)(*error.in_flags)
    reason = " ".join(str(error).split())[:300]
    return MlxSoraError(f"{type(error).__name__}: {reason}")


def _as_single_rank(request: GenerationRequest) -> GenerationRequest:
    """Return the request as one rank makes it. Raises UsageError if checkpoints are asked for."""
    if request.checkpoint_every is not None:
        raise UsageError(
            "--checkpoint-every cannot be combined with --parallel prompts.",
            "Leave one of them out.",
        )
    return replace(request, parallel="auto") if request.parallel == "prompts" else request


def _encoding_groups(runs: Mapping[int, GenerationRun]) -> list[list[int]]:
    """Group the runs that have steps left by number format, bits, memory limits and checks."""
    groups: dict[object, list[int]] = defaultdict(list)
    for index, run in runs.items():
        if run.has_steps_left:
            dtype, checks = run.engine.precision.text_encoder, run.request.health_check
            limits = (run.request.memory_budget, run.request.device_profile, run.request.ci_dl)
            groups[dtype, run.engine.model, checks, limits, run.request.text_cache].append(index)
    return list(groups.values())
