"""Several requests in a row: all text is encoded before T5 leaves memory, then video by video.

What fails in one request is told and leaves the others alone. Encoded text waits on disk, so that
memory does not grow with the number of requests.
"""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_sora.distributed.group import Ranks, deserialize_error, serialize_error
from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.memory.limits import release
from mlx_sora.pipeline.locks import output_lock_on_rank0, process_lock
from mlx_sora.pipeline.pipeline import Pipeline, seeded
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.pipeline.transfer import VideoTransfer
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.events import Event, Finished, RequestFailed, RequestStarted

log = logging.getLogger(__name__)


class BatchRun(Pipeline):
    """Many requests with the model of a pipeline.

    Several ranks take the videos in turn where there are as many (data parallel): each makes its
    own, alone, and sends the files to the first. Fewer are made by all together, one by one.
    """

    def __init__(self, pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> None:
        super().__init__(pipeline.model, pipeline.dtype)
        self._requests = requests
        asked = {request.parallel for request in requests}
        if "off" in asked:
            self.ranks = Ranks()
        kept = any(request.checkpoint_every is not None for request in requests)
        enough = asked == {"auto"} and len(requests) >= self.ranks.size and not kept
        self._apart = self.ranks.size > 1 and ("prompts" in asked or enough)

    def events(self) -> Generator[Event, None, None]:
        """Events of all requests: `Finished` or `RequestFailed` for each of them."""
        return self.ranks.watch_events(self._all())

    def _all(self) -> Generator[Event, None, None]:
        self._agree(self.ranks, self._requests)
        runs: dict[int, GenerationRun] = {}
        for index, request in enumerate(self._requests):
            try:
                runs[index] = self._begin(seeded(request, self.ranks), runs.values())
            except Exception as error:
                yield RequestFailed(index, as_known(error))
        with process_lock(), tempfile.TemporaryDirectory(prefix="mlx_sora-") as folder:
            texts: dict[int, _TextsOnDisk] = {}
            left = {index: run for index, run in runs.items() if run.has_steps_left}
            for number, group in enumerate(_alike(left)):
                store = _TextsOnDisk(Path(folder), f"{number}-")
                yield from self._encode([runs[i] for i in group], store, ranks=self.ranks)
                texts |= dict.fromkeys(group, store)
            if self._apart:
                yield from self._in_turn(runs, texts)
                return
            for index in list(runs):
                yield from self._make_one(index, runs.pop(index), texts.get(index))

    def _in_turn(
        self, runs: dict[int, GenerationRun], texts: Mapping[int, _TextsOnDisk]
    ) -> Generator[Event, None, None]:
        """The videos in rounds, one for each rank; the first tells of the others' afterwards."""
        ranks, order = self.ranks, list(runs)
        for start in range(0, len(order), ranks.size):
            indices, parcel = order[start : start + ranks.size], VideoTransfer()
            if ranks.rank < len(indices):
                own = indices[ranks.rank]
                parcel = yield from self._packed(own, runs[own], texts[own])
            for rank, (index, other) in enumerate(
                zip(indices, parcel.exchanged(ranks), strict=False)
            ):
                run = runs.pop(index)
                if rank != ranks.rank:
                    yield from self._unpacked(index, run, other)

    def _packed(
        self, index: int, run: GenerationRun, texts: _TextsOnDisk
    ) -> Generator[Event, None, VideoTransfer]:
        """A video of this rank, for the first to put in its place where that is not this one."""
        run.more["parallel"] = {"ranks": self.ranks.size, "mode": "prompts"}
        with tempfile.TemporaryDirectory(prefix="mlx_sora-") as folder:
            if run.output is not None and not self.ranks.is_rank0:
                run.output = Path(folder) / run.output.name
            for event in self._make_one(index, run, texts):
                yield event
                if isinstance(event, RequestFailed):
                    return VideoTransfer(error=serialize_error(event.error))
                if isinstance(event, Finished):
                    return (
                        VideoTransfer()
                        if self.ranks.is_rank0
                        else VideoTransfer.of(event.video, Path(folder))
                    )
        raise AssertionError("a request ends with Finished or RequestFailed")

    def _unpacked(self, index: int, run: GenerationRun, parcel: VideoTransfer) -> Iterator[Event]:
        """What became of another rank's video."""
        yield RequestStarted(index, len(self._requests), run.request.prompt, run.settings.seed)
        try:
            if parcel.error is not None:
                raise deserialize_error(*parcel.error)
            yield Finished(parcel.delivered(run, written=self.ranks.is_rank0))
        except Exception as error:
            yield RequestFailed(index, as_known(error))

    def _make_one(
        self, index: int, run: GenerationRun, texts: _TextsOnDisk | None
    ) -> Generator[Event, None, None]:
        prompt, seed = run.request.prompt, run.settings.seed
        yield RequestStarted(index, len(self._requests), prompt, seed)
        try:
            yield from run.begin()
            made = self._make(run, {} if texts is None else texts.of(run))
            with output_lock_on_rank0(run.output, run.ranks):
                yield from made
        except Exception as error:
            failure = as_known(error)
            if run.ranks.size > 1 and not getattr(error, "agreed", False):
                raise  # the others are elsewhere
        else:
            return
        release()
        yield RequestFailed(index, failure)

    def _ranks(self, request: GenerationRequest) -> Ranks:
        return Ranks() if self._apart else self.ranks

    def _begin(self, request: GenerationRequest, others: Iterable[GenerationRun]) -> GenerationRun:
        """The run of a request. Raises UsageError where another goes to the same file."""
        with self.ranks.collective_errors():
            request.validate()
            if self._apart:
                request = _alone(request)
            run = self._begun(request)
            if run.output is not None and any(run.output == other.output for other in others):
                raise UsageError(
                    f"Two videos would go to one file, {run.output}.",
                    "Put {seed} or {index} into the output.",
                )
        run.checkpoints = run.checkpoints.shared_across(run.ranks)
        return run


class _TextsOnDisk(MutableMapping[str, mx.array]):
    """Texts and their states [n, D], each in a file of `folder` whose name begins with `prefix`."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix
        self._files: dict[str, Path] = {}

    def of(self, run: GenerationRun) -> dict[str, mx.array]:
        """The states that a run needs, in memory."""
        return {text: self[text] for text in run.settings.all_texts}

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
        except RuntimeError as error:  # MLX's word for a disk that is full or gone
            raise MlxSoraError(
                f"Cannot write {file}: {error}", "Make room there, or set TMPDIR to another folder."
            ) from error

    def __delitem__(self, text: str) -> None:
        self._files.pop(text).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def as_known(error: Exception) -> MlxSoraError:
    """An error as one of ours, without the frames that it came from: they hold networks."""
    log.debug("a request failed", exc_info=error)
    if isinstance(error, MlxSoraError):
        return type(error)(error.message, error.fix)
    reason = " ".join(str(error).split())[:300]
    return MlxSoraError(f"{type(error).__name__}: {reason}")


def _alone(request: GenerationRequest) -> GenerationRequest:
    """The request as a single rank makes it. Raises UsageError for what that does not go with."""
    if request.checkpoint_every is not None:
        raise UsageError(
            "--checkpoint-every does not go with --parallel prompts.", "Leave one of them out."
        )
    return replace(request, parallel="auto") if request.parallel == "prompts" else request


def _alike(runs: Mapping[int, GenerationRun]) -> list[list[int]]:
    """Numbers of runs that T5 can serve together: of one number format, bits, limit and checks."""
    groups: dict[object, list[int]] = defaultdict(list)
    for index, run in runs.items():
        weights = (run.dtype, run.request.quantize, run.request.health_check)
        groups[weights, run.settings.memory_budget, run.request.ci_dl].append(index)
    return list(groups.values())
