"""Prompt in, video out: encode, denoise, decode. Owns the lifetimes of the networks, nothing else.

Each stage builds its network, uses it and lets it go before the next one begins, so that the memory
needed is that of the largest stage. A run is a generator of events (`runtime/events.py`); a caller
that stops listening ends the run and leaves no file behind.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_sora.accel import Accelerations
from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.conditioning.latents import encode_tasks
from mlx_sora.distributed.group import Ranks, init_ranks
from mlx_sora.distributed.partition import ParallelPlan, choose_parallel
from mlx_sora.errors import UsageError
from mlx_sora.loading.model_folder import BUNDLED, PUBLISHED, ModelFolder, find_model, fingerprint
from mlx_sora.loading.quantization import choose_quantization, quantization_metadata
from mlx_sora.loading.sizes import model_sizes
from mlx_sora.memory.limits import default_cache_limit
from mlx_sora.memory.plan import Machine, MediaWorkload, Plan, StepVariant, Workload
from mlx_sora.memory.planner import make_plan
from mlx_sora.models.ops import on_gpu
from mlx_sora.pipeline.locks import run_exclusively
from mlx_sora.pipeline.preview import Previews
from mlx_sora.pipeline.resume import attach, resumed_request, with_seed
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.pipeline.settings import ResolvedRequest, resolve
from mlx_sora.pipeline.stages import Stages, Texts
from mlx_sora.request.generation import GenerationRequest, label
from mlx_sora.runtime.device import default_dtype, describe, total_memory
from mlx_sora.runtime.events import Event, Finished
from mlx_sora.sampling import SAMPLERS
from mlx_sora.text.tokenizer import Tokenizer
from mlx_sora.utils.versions import versions
from mlx_sora.video import Video
from mlx_sora.video.frames import CountedFrames, FrameWriter, KeptFrames
from mlx_sora.video.output_path import check_output, output_path
from mlx_sora.video.writer import checked_writer, write_sidecar

if TYPE_CHECKING:
    from mlx_sora.request.edit import EditRequest

log = logging.getLogger(__name__)


class Pipeline(Stages):
    """Text to video with one model, one run at a time; no weights in between."""

    def __init__(self, model: ModelFolder, dtype: str = "auto") -> None:
        self.model = model
        self.dtype = dtype
        #: The processes that mlx.launch started with this one; most often it is alone.
        self.ranks = init_ranks()
        default_dtype(requested=dtype)  # refuses what the device cannot do, before any work

    @classmethod
    def from_pretrained(cls, model: str | Path | None = None, *, dtype: str = "auto") -> Pipeline:
        """A pipeline for `shapes`, `opensora-1.2` or a model folder; None picks the best present.

        dtype: auto, float32 or bfloat16. Raises WeightsError when the model is not there or not
        whole. Nothing is downloaded, and no weight is read yet.
        """
        found = find_model(model)
        if model is None and found.name == BUNDLED:
            log.warning("%s is not here; using the bundled model %s", PUBLISHED, BUNDLED)
        return cls(found, dtype)

    def __call__(self, prompt: str, **options: Any) -> Video:
        """Make one video. options: fields of GenerationRequest (seed, steps, output, ...).

        Without `output`, the video holds its frames in memory.
        """
        request = GenerationRequest.from_dict({"prompt": prompt, **options})
        for event in self.stream(request):
            if isinstance(event, Finished):
                return event.video
        raise AssertionError("a run ends with Finished or with an error")

    def stream(
        self, request: GenerationRequest, resume: str | Path | None = None
    ) -> Generator[Event, None, None]:
        """Events of one run, `Finished` the last. Bad requests raise here, before any work.

        resume: checkpoint of the same request to go on from, wherever it is; the one beside the
        output is found by itself where the request has checkpoint_every. Closing the generator ends
        the run and removes what it had begun to write. Of several ranks all have to ask for the
        same; the first one has the files, or the frames.
        """
        ranks = self._ranks(request)
        with ranks.watchdog_scope():
            request = seeded(request, ranks)
            self._agree(ranks, [request])
            with ranks.collective_errors():
                request.validate()
                run = self._begun(request, None if resume is None else Path(resume))
            run.checkpoints = run.checkpoints.shared_across(ranks)
        return ranks.watch_events(run_exclusively(run.output, self._events(run), ranks))

    def resume(self, checkpoint: str | Path, **options: Any) -> Video:
        """Finish the video of a checkpoint, beside it. options: such as change nothing it shows."""
        values: dict[str, Any] = {}
        with self.ranks.collective_errors():
            if self.ranks.is_rank0:
                values = resumed_request(Path(checkpoint), options).to_dict()
        request = GenerationRequest.from_dict(self.ranks.broadcast_object(values))
        for event in self.stream(request, checkpoint):
            if isinstance(event, Finished):
                return event.video
        raise AssertionError("a run ends with Finished or with an error")

    def stream_all(self, requests: Sequence[GenerationRequest]) -> Generator[Event, None, None]:
        """Yield the events of several requests: `Finished` or `RequestFailed` for each of them.

        All prompts are encoded before the first video is made. A failure ends its own request only.
        """
        from mlx_sora.pipeline.batch import BatchRun

        return BatchRun(self, requests).events()

    def edit(self, video: str | Path, **options: Any) -> Video:
        """Change what a video shows: `source_prompt` says what that is, `prompt` what it shall be.

        options: those of EditRequest, such as inject_steps, and fields of GenerationRequest that an
        edit shares (steps, guidance, sampler, output, ...). A picture is a video of one frame.
        """
        from mlx_sora.request.edit import EditRequest as Request

        for event in self.stream_edit(Request.from_options(video, options)):
            if isinstance(event, Finished):
                return event.video
        raise AssertionError("an edit ends with Finished or with an error")

    def stream_edit(self, edit: EditRequest) -> Generator[Event, None, None]:
        """Events of one edit, as `stream` has those of a generation."""
        from mlx_sora.pipeline.edit import Editing

        with self._ranks(edit.target).collective_errors():
            editing = Editing(self, edit)
        return editing.events()

    def plan_edit(self, edit: EditRequest) -> Plan:
        """What an edit would need, as `plan` says it of a generation."""
        from mlx_sora.pipeline.edit import Editing

        return Editing(self, edit).needs()

    def plan(self, request: GenerationRequest) -> Plan:
        """What the run would need, stage by stage, without running it; reads headers only.

        Raises what `stream` would raise, MemoryBudgetError with the smallest budget included.
        """
        return self.prepared(request).plan

    def prepared(self, request: GenerationRequest) -> GenerationRun:
        """The run as it would begin. Raises as `plan` does."""
        request.validate()
        return self._prepare(request.with_seed())

    def info(self) -> dict[str, Any]:
        """Model, its parts, origin and quick checks, device and versions; plain JSON values."""
        from mlx_sora.manage.info import describe_model

        return {
            "model": self.model.name,
            "path": str(self.model.path),
            **describe_model(self.model),
            "defaults": asdict(self.model.defaults),
            "machine": describe(),
        }

    def _begun(self, request: GenerationRequest, resume: Path | None = None) -> GenerationRun:
        """A prepared run that keeps checkpoints, if it was asked to, and goes on from its own."""
        run = self._prepare(request)
        if run.ranks.is_rank0 and (request.checkpoint_every is not None or resume is not None):
            attach(run, fingerprint(self.model), resume)
        return run

    def _ranks(self, request: GenerationRequest) -> Ranks:
        """Those that make a video together."""
        return Ranks() if request.parallel == "off" else self.ranks

    def _agree(self, ranks: Ranks, requests: Sequence[GenerationRequest], **more: Any) -> None:
        """Raise UsageError where ranks have other versions, weights, requests or `more`."""
        if ranks.size > 1:
            with ranks.collective_errors():
                weights = fingerprint(self.model)
            asked: dict[str, Any] = {"requests": [request.to_dict() for request in requests]}
            if len(requests) == 1:
                asked = {label(name): value for name, value in requests[0].to_dict().items()}
            ranks.check_equal({**versions(), "weights": weights, **asked, **more})

    def _division(self, request: GenerationRequest, settings: ResolvedRequest) -> ParallelPlan:
        """What each of them does of it."""
        ranks = self._ranks(request).size
        return choose_parallel(request.parallel, ranks, guided=settings.guidance != 1)

    def _prepare(self, request: GenerationRequest) -> GenerationRun:
        """Decide everything that can be decided without weights; raises UsageError."""
        request, ranks = request.with_preset(), self._ranks(request)
        if request.model is not None and find_model(request.model).path != self.model.path:
            raise UsageError(
                f"This pipeline holds {self.model.name}, the request asks for {request.model}.",
                "Make a pipeline of that model, or leave the request's model open.",
            )
        dtype = default_dtype(requested=self.dtype if request.dtype == "auto" else request.dtype)
        settings, warnings = resolve(request, self.model)
        division = self._division(request, settings)
        job = self._job(settings)
        if division.ranks > 1:
            job = replace(job, agree=ranks.broadcast_object)
        accelerations = Accelerations(settings.accelerations, job)
        output = _output(request, settings, checked=self.ranks.is_rank0)
        warnings += accelerations.warnings
        tokenizer = Tokenizer.load(self.model.tokenizer)
        length = max(len(tokenizer.encode(text).ids) for text in settings.all_texts)
        work = self._work(request, settings, accelerations, length)
        work = replace(work, cfg_parallel=work.guided and division.cfg_degree > 1)
        plan = self._plan(request, settings, dtype, work)
        run = GenerationRun(
            request, settings, dtype, output, accelerations, tokenizer, plan, warnings
        )
        run.ranks, run.division, run.work = ranks, division, work
        run.previews = Previews.of(request, self.model, settings, output)
        run.more |= quantization_metadata(choose_quantization(self.model, request.quantize))
        return run

    def _job(self, settings: ResolvedRequest) -> ScheduleInfo:
        """The run as accelerations see it."""
        geometry, sampler = settings.geometry, SAMPLERS[settings.sampler]
        times = sampler.timesteps(settings.steps, **settings.model_args.sizes)
        return ScheduleInfo(
            steps=settings.steps,
            evaluations=sampler.evaluations,
            frames=geometry.latent[0],
            guided=settings.guidance != 1,
            times=tuple(float(t) for t in times[:-1, 0]),
            model=self.model.path,
            size=(*geometry.size, geometry.num_frames),
        )

    def _plan(
        self,
        request: GenerationRequest,
        settings: ResolvedRequest,
        dtype: mx.Dtype,
        work: Workload,
    ) -> Plan:
        """Memory, reading and work per stage. Reads headers only; raises MemoryBudgetError."""
        machine = Machine(on_gpu(), default_cache_limit() or total_memory(), dtype.size)
        model = choose_quantization(self.model, request.quantize)
        sizes = model_sizes(model, dtype, encoders=work.media is not None)
        return make_plan(sizes, work, machine, settings.memory_budget, streamed=request.ci_dl)

    def _work(
        self,
        request: GenerationRequest,
        settings: ResolvedRequest,
        accelerations: Accelerations,
        text_tokens: int,
    ) -> Workload:
        """What the run is about, as far as memory and work go."""
        per_step = SAMPLERS[settings.sampler].evaluations
        return Workload(
            geometry=settings.geometry,
            text_tokens=text_tokens,
            evaluations=settings.steps * per_step,
            variants=_spared(accelerations, settings.steps, per_step),
            cached_residuals=accelerations.cached_residuals,
            guided=settings.guidance != 1,
            sequential=request.sequential_guidance,
            media=_reading(settings),
            clips=settings.clips.count,
            shared_frames=settings.clips.shared,
            vae_tiles=settings.vae_tiles,
        )

    def _events(self, run: GenerationRun) -> Generator[Event, None, None]:
        texts: dict[str, mx.array] = {}
        yield from run.begin()
        if run.has_steps_left:
            yield from self._encode([run], texts)
        yield from self._make(run, texts)

    def _make(self, run: GenerationRun, texts: Texts) -> Generator[Event, None, None]:
        """All clips of a run whose text is encoded, each written as soon as it is made."""
        given = (yield from self._read(run)) if run.has_steps_left else None
        with ExitStack() as opened:
            writer: FrameWriter | None = None
            for clip in range(run.settings.clips.count):
                latents = run.checkpoints.finished(clip)
                if given is not None:
                    if latents is None:
                        latents = yield from self._denoise(run, texts, clip, given)
                    given.keep(clip, latents)
                assert latents is not None, "without steps to make all clips are finished"
                if writer is None:
                    writer = opened.enter_context(self._written(run))
                yield from self._decode_clip(run, clip, latents, writer)
                del latents
        assert writer is not None, "there is a first clip"
        video = self._finished(run, writer)
        run.checkpoints.remove()
        yield Finished(video)

    def _decode(self, run: GenerationRun, latents: mx.array) -> Generator[Event, None, Video]:
        """The latents of a run's only clip to the finished video."""
        with self._written(run) as writer:
            yield from self._decode_clip(run, 0, latents, writer)
        return self._finished(run, writer)

    @contextmanager
    def _written(self, run: GenerationRun) -> Iterator[FrameWriter]:
        """What takes a run's frames; signed and closed, by all ranks, as the block ends well."""
        with ExitStack() as opened:
            writer = self._writer(run)
            opened.enter_context(writer)
            yield writer
            if run.request.embed_metadata:
                writer.metadata = run.record()
            with run.ranks.collective_errors():
                opened.close()

    def _finished(self, run: GenerationRun, writer: FrameWriter) -> Video:
        """The video, once its writer has closed; also writes the sidecar that was asked for."""
        kept = writer.frames if isinstance(writer, KeptFrames) else None
        video = run.video(writer.path, kept)
        with run.ranks.collective_errors():
            if video.path is not None and run.request.metadata:
                write_sidecar(video.path, video.metadata, run.request.overwrite)
        return video

    def _writer(self, run: GenerationRun) -> FrameWriter:
        if not run.ranks.is_rank0:
            return CountedFrames()
        if run.output is None:
            return KeptFrames()
        settings = run.settings
        return checked_writer(
            run.output,
            settings.geometry.decoded,
            settings.fps,
            overwrite=run.request.overwrite,
        )


def seeded(request: GenerationRequest, ranks: Ranks) -> GenerationRequest:
    """The request with a seed, the same on all ranks."""
    return replace(request, seed=ranks.broadcast_object(with_seed(request).seed))


def _output(request: GenerationRequest, settings: ResolvedRequest, *, checked: bool) -> Path | None:
    """Where the video goes; raises UsageError where it cannot, if that is to be checked."""
    if request.output is None:
        return None
    frames = settings.clips.total
    path = output_path(request.output, prompt=request.prompt, seed=settings.seed, num_frames=frames)
    if checked:
        check_output(
            path,
            request.overwrite,
            sidecar=request.metadata,
            num_frames=frames,
            size=settings.geometry.decoded,
            fps=settings.fps,
        )
    return path


def _reading(settings: ResolvedRequest) -> MediaWorkload | None:
    """What is to be encoded of media, if anything."""
    todo = encode_tasks(settings.media, settings.geometry.size)
    if not todo:
        return None
    pixels = max(source.size.width * source.size.height for source in settings.media.sources)
    return MediaWorkload(len(todo), max(task.frames for task in todo), pixels)


def _spared(
    accelerations: Accelerations, steps: int, per_step: int
) -> tuple[tuple[StepVariant, int], ...]:
    """Evaluations that leave something out, by kind, as far as that is known before the run."""
    kinds = Counter(
        StepVariant(
            tokens_merged=accelerations.merges_tokens(step),
            cond_only=step in accelerations.cond_only_steps,
            blocks_skipped=step in accelerations.skipped_steps,
        )
        for step in range(steps)
    )
    return tuple((kind, count * per_step) for kind, count in kinds.items() if kind != StepVariant())
