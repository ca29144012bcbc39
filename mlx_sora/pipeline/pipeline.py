"""Pipeline: the public Python API of a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora.distributed.group import Ranks, init_ranks
from mlx_sora.errors import UsageError
from mlx_sora.loading.model_folder import BUNDLED, PUBLISHED, ModelFolder, find_model
from mlx_sora.memory.plan import Plan
from mlx_sora.pipeline.bar import ProgressBar
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.generate import generate, prepare
from mlx_sora.pipeline.locks import run_exclusively
from mlx_sora.pipeline.resume import continue_on_ranks, resumed_request
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.request.generation import GenerationRequest, keyword_errors, to_keywords
from mlx_sora.request.generation import options as all_options
from mlx_sora.request.words import in_keywords
from mlx_sora.runtime.compile_cache import ensure_compile_cache
from mlx_sora.runtime.device import choose_precision, describe_machine
from mlx_sora.runtime.events import Event, Finished, RequestFailed, Warned
from mlx_sora.video import Video

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mlx_sora.request.edit import EditRequest
    from mlx_sora.request.keywords import (
        EditKeywords,
        Footage,
        GenerationKeywords,
        Picture,
        ReconstructionKeywords,
    )

log = logging.getLogger(__name__)


class Pipeline:
    """Text to video with one model, one run at a time. Holds no weights between runs.

    pipe = Pipeline("shapes"); video = pipe("a red circle on a white background", seed=1).

    Any thread may run it; one that stays is best, because MLX keeps a thread of the system for each
    Python thread that has computed.
    """

    @keyword_errors()
    def __init__(self, model: ModelFolder | str | Path | None = None, dtype: str = "auto") -> None:
        """Open `shapes`, `opensora-1.2` or a model folder; None picks the best one.

        dtype: auto, float32, bfloat16 or float16 (transformer only). Downloads nothing and reads no
        weights yet. Raises WeightsError if the model is absent or incomplete.
        """
        ensure_compile_cache()
        found = model if isinstance(model, ModelFolder) else find_model(model)
        if model is None and found.name == BUNDLED:
            log.warning("%s is not downloaded; using the bundled model %s", PUBLISHED, BUNDLED)
        self.engine = Engine(found, dtype, init_ranks())
        choose_precision(dtype)  # refuses what the device cannot do, before any work

    @classmethod
    def from_pretrained(cls, model: str | Path | None = None, *, dtype: str = "auto") -> Pipeline:
        """Return `Pipeline(model, dtype)`, under the name that other libraries use."""
        return cls(model, dtype)

    def __repr__(self) -> str:
        """Return model and data type."""
        return f"Pipeline({self.model.name!r}, dtype={self.dtype!r})"

    @property
    def model(self) -> ModelFolder:
        """Folder of the model."""
        return self.engine.model

    @property
    def dtype(self) -> str:
        """Number format that was asked for: auto, float32, bfloat16 or float16."""
        return self.engine.dtype

    @property
    def ranks(self) -> Ranks:
        """Processes that mlx.launch started with this one; most often there is only this one."""
        return self.engine.ranks

    def __call__(
        self,
        prompt: str | GenerationRequest,
        *,
        callback: Callable[[Event], object] | None = None,
        progress: bool = False,
        **options: Unpack[GenerationKeywords],
    ) -> Video:
        """Make one video, or with num_frames=1 an image.

        prompt: text, or a whole request, then without options.
        options: fields of GenerationRequest, such as seed, steps, guidance, negative_prompt,
        num_frames (51 or "2s"), width and height, images and videos (paths, PIL images, arrays or
        videos), preset ("fast"), memory_budget ("8GB"), output ("clip.mp4") and overwrite. All are
        in mlx_sora/request/README.md. Without `output` the frames stay in memory.
        callback: gets every event, such as StepFinished (mlx_sora.runtime.events). What it raises
        ends the run, and leaves no partial file. progress: show a bar on stderr.
        """
        return self._video(self.stream(prompt, **options), callback, progress)

    @keyword_errors()
    def stream(
        self,
        request: GenerationRequest | str,
        resume: str | Path | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> Generator[Event, None, None]:
        """Yield the events of one run, `Finished` last. Bad requests raise here, before any work.

        request: a request, or a prompt with `options` as in a call. resume: checkpoint of the same
        request to continue from; with `checkpoint_every` the one beside the output is found by
        itself. Closing the generator ends the run and removes its partial file. Of several ranks,
        all must pass the same request; the first has the file, or the frames.
        """
        request = _as_request(request, options)
        ranks = Ranks() if request.parallel == "off" else self.ranks
        with ranks.watchdog_scope():
            if ranks.size > 1:
                self.engine.check_equal([request])
            request = continue_on_ranks(request, ranks, self.model.name)
            with ranks.collective_errors():
                request.validate()
                checkpoint = None if resume is None else Path(os.path.expanduser(resume))
                run = prepare(self.engine, request, checkpoint)
            run.checkpoints.share(ranks)
        events = run_exclusively(self.model.path, run.output, _events(run), ranks)
        return _in_keywords(ranks.watch_events(events))

    def unread_weights(self, requests: Sequence[GenerationRequest]) -> int:
        """Return the bytes that must be read once, for checkpoints or ranks to compare weights."""
        if self.ranks.size == 1 and all(each.checkpoint_every is None for each in requests):
            return 0
        return self.engine.unread_bytes

    def hash_weights(self, requests: Sequence[GenerationRequest]) -> Iterator[Event]:
        """Read the `unread_weights`; yield the progress in MB. `stream` reads them without that."""
        if self.unread_weights(requests):
            yield from self.engine.hash_weights()

    @keyword_errors()
    def resume(
        self,
        checkpoint: str | Path,
        *,
        callback: Callable[[Event], object] | None = None,
        progress: bool = False,
        **options: Unpack[GenerationKeywords],
    ) -> Video:
        """Finish the video of a checkpoint, beside it. options: must not change what it shows.

        callback, progress: as in a call.
        """
        checkpoint, values = os.path.expanduser(checkpoint), dict[str, Any]()
        with self.ranks.collective_errors():
            if self.ranks.is_rank0:
                values = resumed_request(Path(checkpoint), options).to_dict()
        values = self.ranks.broadcast_object(values)
        pixels = {
            name: options[name] for name in ("images", "videos", "references") if name in options
        }
        request = GenerationRequest.from_dict(values | pixels)
        return self._video(self.stream(request, checkpoint), callback, progress)

    @keyword_errors()
    def stream_all(self, requests: Sequence[GenerationRequest]) -> Generator[Event, None, None]:
        """Yield the events of several requests: `Finished` or `RequestFailed` for each.

        All text is encoded before the first video is made. A request that fails, even before any
        work, does not stop the others.
        """
        from mlx_sora.pipeline.batch import generate_batch

        return _in_keywords(generate_batch(self.engine, requests))

    def edit(
        self,
        video: Footage | Picture,
        *,
        source_prompt: str,
        prompt: str,
        callback: Callable[[Event], object] | None = None,
        progress: bool = False,
        **options: Unpack[EditKeywords],
    ) -> Video:
        """Change what a video shows: from `source_prompt`, what it shows now, to `prompt`.

        video: a path, pixels or a Video; an image is a video of one frame. options: those of
        EditRequest, such as inject_steps, and the fields of GenerationRequest that edits share
        (steps, guidance, sampler, output, ...). callback, progress: as in a call.
        """
        from mlx_sora.request.edit import EditRequest as Request

        values = {"source_prompt": source_prompt, "prompt": prompt, **options}
        events = self.stream_edit(Request.from_options(video, values))
        return self._video(events, callback, progress)

    @keyword_errors()
    def stream_edit(self, edit: EditRequest) -> Generator[Event, None, None]:
        """Yield the events of one edit, as `stream` does for a generation."""
        from mlx_sora.pipeline.edit import stream_edit

        return _in_keywords(stream_edit(self.engine, edit))

    def plan_edit(self, edit: EditRequest) -> Plan:
        """Plan an edit, as `plan` does for a generation."""
        return self.prepare_edit(edit).plan

    @keyword_errors()
    def prepare_edit(self, edit: EditRequest) -> GenerationRun:
        """Return the run of an edit as it would begin. Raises as `plan` does."""
        from mlx_sora.pipeline.edit import prepare_edit

        return prepare_edit(self.engine, edit).run

    @keyword_errors()
    def reconstruct(
        self,
        video: Footage | Picture,
        *,
        callback: Callable[[Event], object] | None = None,
        progress: bool = False,
        **options: Unpack[ReconstructionKeywords],
    ) -> Video:
        """Encode and decode a video or an image with the VAE alone; it shows what the VAE loses.

        video, callback, progress: as in `edit`. PSNR in dB and SSIM to the frames that were encoded
        are in `metadata["reconstruction"]`.
        """
        from mlx_sora.pipeline.reconstruct import reconstruction_request, stream_reconstruction

        events = stream_reconstruction(self.engine, video, reconstruction_request(options))
        return self._video(_in_keywords(events), callback, progress)

    def plan(self, request: GenerationRequest | str, **options: Unpack[GenerationKeywords]) -> Plan:
        """Plan memory, reading and work of each stage, without running it. Reads headers only.

        request: as in `stream`. Raises what `stream` would raise, MemoryBudgetError with the
        smallest budget included.
        """
        return self.prepare(_as_request(request, options)).plan

    @keyword_errors()
    def prepare(self, request: GenerationRequest) -> GenerationRun:
        """Return the run as it would begin. Raises as `plan` does."""
        request.validate()
        return prepare(self.engine, replace(request.with_seed(), checkpoint_every=None))

    def _video(
        self,
        events: Generator[Event, None, None],
        callback: Callable[[Event], object] | None,
        progress: bool,
    ) -> Video:
        """Run to the end; log warnings."""
        handlers = [_log_warning] if callback is None else [_log_warning, callback]
        if not progress or not self.ranks.is_rank0:
            return last_video(events, handlers)
        with closing(ProgressBar()) as bar:
            return last_video(events, [bar.handle, *handlers])

    def info(self) -> dict[str, Any]:
        """Return model, parts, origin, quick checks, device and versions as plain JSON values."""
        from mlx_sora.manage.info import describe_model

        return {
            "model": self.model.name,
            "path": str(self.model.path),
            **describe_model(self.model),
            "defaults": asdict(self.model.defaults),
            "draws": self.model.card.to_dict(),
            "machine": describe_machine(),
        }


def _events(run: GenerationRun) -> Generator[Event, None, None]:
    yield Finished((yield from generate(run)))


def _in_keywords(events: Generator[Event, None, None]) -> Generator[Event, None, None]:
    """Yield the events; errors during the run, and of failed requests, speak of keywords."""
    with keyword_errors(), closing(events):
        for event in events:
            if isinstance(event, RequestFailed):
                to_keywords(event.error)
            yield event


def _as_request(request: GenerationRequest | str, options: Mapping[str, Any]) -> GenerationRequest:
    """Return a request, made from the prompt and options if it is none."""
    if isinstance(request, GenerationRequest):
        if options:
            name = next(iter(options))
            fix = f"Put {name} into the request, or pass its prompt instead."
            raise UsageError(f"The request is complete; {name} is not part of it.", fix)
        return request
    return GenerationRequest.from_dict({"prompt": request, **options})


def last_video(
    events: Generator[Event, None, None], handlers: Sequence[Callable[[Event], object]] = ()
) -> Video:
    """Run to the end and return the video. handlers: each gets every event."""
    video = None
    with closing(events):  # ends the run at once if a handler raises
        for event in events:
            for handle in handlers:
                handle(event)
            if isinstance(event, Finished):
                video = event.video
    assert video is not None, "a run ends with Finished or with an error"
    return video


def _log_warning(event: Event) -> None:
    """Log a warning of a run, which nobody sees otherwise."""
    if isinstance(event, Warned):
        log.warning("%s", in_keywords(event.message, all_options()))
