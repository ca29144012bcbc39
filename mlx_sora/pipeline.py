"""Prompt in, video out: encode, denoise, decode. Owns the lifetimes of the networks, nothing else.

Each stage builds its network, uses it and lets it go before the next one begins, so that the memory
needed is that of the largest stage. A run is a generator of events (`runtime/events.py`); a caller
that stops listening ends the run and leaves no file behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_sora.accel import Accelerations
from mlx_sora.accel.base import Job
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.errors import NumericsError, UsageError
from mlx_sora.lifetimes import Lifetimes
from mlx_sora.loading.facts import describe_model, quantized_parts
from mlx_sora.loading.model_folder import BUNDLED, PUBLISHED, ModelFolder, find_model
from mlx_sora.loading.networks import load_vae
from mlx_sora.loading.sizes import model_sizes
from mlx_sora.models.context import Context
from mlx_sora.models.ops import on_gpu
from mlx_sora.models.stdit3 import BlockPair, STDiT3
from mlx_sora.request import GenerationRequest
from mlx_sora.run import Run
from mlx_sora.runtime.device import default_dtype, describe, total_memory
from mlx_sora.runtime.events import (
    Event,
    Finished,
    Noted,
    PreviewReady,
    StageProgress,
    StageStarted,
    StepFinished,
    Warned,
)
from mlx_sora.runtime.memory import StageMeter, default_cache_limit
from mlx_sora.runtime.planner import Job as Work
from mlx_sora.runtime.planner import Machine, Plan, make_plan
from mlx_sora.sampling import SAMPLERS
from mlx_sora.sampling.guidance import Network, guided
from mlx_sora.sampling.loop import denoise
from mlx_sora.sampling.noise import Noise
from mlx_sora.settings import Settings, settle
from mlx_sora.text.encoder import TextEncoder
from mlx_sora.text.tokenizer import Tokenizer
from mlx_sora.video import Video
from mlx_sora.video.frames import KeptFrames, to_uint8
from mlx_sora.video.output import check_output, output_path
from mlx_sora.video.writer import VideoWriter, open_writer, write_sidecar

if TYPE_CHECKING:
    import numpy as np

    from mlx_sora.edit_request import EditRequest

log = logging.getLogger(__name__)


class Pipeline:
    """Text to video with one model. Holds no weights between runs; safe to keep and to reuse."""

    def __init__(self, model: ModelFolder, dtype: str = "auto") -> None:
        self.model = model
        self.dtype = dtype
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

    def stream(self, request: GenerationRequest) -> Generator[Event, None, None]:
        """Events of one run, `Finished` the last. Bad requests raise here, before any work.

        Closing the generator ends the run and removes what it had begun to write.
        """
        request.validate()
        return self._events(self._prepare(request.with_seed()))

    def edit(self, video: str | Path, **options: Any) -> Video:
        """Change what a video shows: `source_prompt` says what that is, `prompt` what it shall be.

        options: those of EditRequest, such as inject_steps, and fields of GenerationRequest that an
        edit shares (steps, guidance, sampler, output, ...). A picture is a video of one frame.
        """
        from mlx_sora.edit_request import EditRequest as Request

        for event in self.stream_edit(Request.of(video, options)):
            if isinstance(event, Finished):
                return event.video
        raise AssertionError("an edit ends with Finished or with an error")

    def stream_edit(self, edit: EditRequest) -> Generator[Event, None, None]:
        """Events of one edit, as `stream` has those of a generation."""
        from mlx_sora.editing import Editing

        return Editing(self, edit).events()

    def plan_edit(self, edit: EditRequest) -> Plan:
        """What an edit would need, as `plan` says it of a generation."""
        from mlx_sora.editing import Editing

        return Editing(self, edit).needs()

    def plan(self, request: GenerationRequest) -> Plan:
        """What the run would need, stage by stage, without running it; reads headers only.

        Raises what `stream` would raise, MemoryBudgetError with the smallest budget included.
        """
        request.validate()
        return self._prepare(request.with_seed()).plan

    def info(self) -> dict[str, Any]:
        """Model, its parts, origin and quick checks, device and versions; plain JSON values."""
        return {
            "model": self.model.name,
            "path": str(self.model.path),
            **describe_model(self.model),
            "defaults": asdict(self.model.defaults),
            "machine": describe(),
        }

    def _prepare(self, request: GenerationRequest) -> Run:
        """Decide everything that can be decided without weights; raises UsageError."""
        if request.model is not None and find_model(request.model).path != self.model.path:
            raise UsageError(
                f"This pipeline holds {self.model.name}, the request asks for {request.model}.",
                "Make a pipeline of that model, or leave the request's model open.",
            )
        dtype = default_dtype(requested=self.dtype if request.dtype == "auto" else request.dtype)
        settings, warnings = settle(request, self.model)
        geometry, sampler = settings.geometry, SAMPLERS[settings.sampler]
        job = Job(settings.steps, sampler.evaluations, geometry.latent[0])
        accelerations = Accelerations(settings.accelerations, job)
        output = None
        if request.output is not None:
            output = output_path(
                request.output,
                prompt=request.prompt,
                seed=settings.seed,
                num_frames=geometry.num_frames,
            )
            check_output(
                output,
                request.overwrite,
                sidecar=request.metadata,
                num_frames=geometry.num_frames,
                size=geometry.decoded,
                fps=settings.fps,
            )
        warnings += accelerations.warnings
        tokenizer = Tokenizer.load(self.model.tokenizer)
        length = len(tokenizer.encode(settings.text).ids)
        plan = self._plan(request, settings, dtype, accelerations, length)
        return Run(request, settings, dtype, output, accelerations, tokenizer, plan, warnings)

    def _plan(
        self,
        request: GenerationRequest,
        settings: Settings,
        dtype: mx.Dtype,
        accelerations: Accelerations,
        text_tokens: int,
    ) -> Plan:
        """Memory, reading and work per stage. Reads headers only; raises MemoryBudgetError."""
        work = self._work(request, settings, accelerations, text_tokens)
        machine = Machine(on_gpu(), default_cache_limit() or total_memory(), dtype.size)
        sizes = model_sizes(self.model, dtype)
        return make_plan(sizes, work, machine, settings.memory_budget, streamed=request.ci_dl)

    def _work(
        self,
        request: GenerationRequest,
        settings: Settings,
        accelerations: Accelerations,
        text_tokens: int,
    ) -> Work:
        """What the run is about, as far as memory and work go."""
        per_step = SAMPLERS[settings.sampler].evaluations
        return Work(
            geometry=settings.geometry,
            text_tokens=text_tokens,
            evaluations=settings.steps * per_step,
            merged=sum(map(accelerations.merges, range(settings.steps))) * per_step,
            guided=settings.guidance != 1,
            sequential=request.sequential_guidance,
        )

    def _events(self, run: Run) -> Generator[Event, None, None]:
        yield from (Warned(warning) for warning in run.warnings)
        text = yield from self._encode(run)
        latents = yield from self._denoise(run, text)
        del text
        yield Finished((yield from self._decode(run, latents)))

    def _encode(self, run: Run) -> Generator[Event, None, mx.array]:
        """Text states of the prompt, [n, D]; T5 is gone when this ends."""
        yield StageStarted("encode", 1)
        plan, lifetimes = run.plan.stage("encode"), self._lifetimes(run)
        with StageMeter("encode") as meter, lifetimes.stage(plan):
            with lifetimes.text_encoder(plan) as (network, rows, blocks):
                encoder = TextEncoder(network, rows, run.tokenizer, run.dtype, blocks)
                text = encoder.encode(run.settings.text)
                run.note_stream("encode", blocks)
            del network, rows, blocks, encoder
        for warning in text.warnings:
            run.warnings.append(warning)
            yield Warned(warning)
        yield StageProgress("encode", 1, 1)
        yield run.close_stage(meter)
        return text.states

    def _lifetimes(self, run: Run) -> Lifetimes:
        budget = run.settings.memory_budget
        return Lifetimes(self.model, run.dtype, budget, run.request.ci_dl or budget is not None)

    def _denoise(self, run: Run, text: mx.array) -> Generator[Event, None, mx.array]:
        """Latents of the video, [1, T, H, W, C]; the transformer is gone when this ends."""
        yield StageStarted("denoise", run.settings.steps)
        plan, lifetimes = run.plan.stage("denoise"), self._lifetimes(run)
        with StageMeter("denoise") as meter, lifetimes.stage(plan):
            with lifetimes.transformer(plan) as (network, blocks):
                latents = yield from self._steps(run, text, network, blocks)
                run.note_stream("denoise", blocks)
            del network, blocks
        yield run.close_stage(meter)
        return latents

    def _steps(
        self, run: Run, text: mx.array, network: STDiT3, blocks: BlockStream[BlockPair] | None
    ) -> Generator[Event, None, mx.array]:
        """One event per step; the finished latents at the end."""
        settings, geometry = run.settings, run.settings.geometry
        velocity = guided(
            partial(bound, network, run, lambda i, t: run.accelerations.context(i, blocks)),
            [text],
            network.null_text,
            settings.guidance,
            sequential=run.request.sequential_guidance,
        )
        sampler = SAMPLERS[settings.sampler]
        width, height = geometry.size
        times = sampler.timesteps(
            settings.steps, height=height, width=width, num_frames=geometry.num_frames
        )
        z = Noise([settings.seed], (*geometry.latent, network.config.in_channels)).initial()
        every = run.request.preview_every
        for done in denoise(velocity, z, times, sampler, policy=run.accelerations.policy):
            z, index = done.z, done.step.index
            check_finite(z, index)
            run.accelerations.watch(done)
            merges = run.accelerations.merges
            if blocks is not None and merges(index) != merges(index + 1):
                blocks.reconsider()
            yield StepFinished(index, done.step.total, done.t, done.seconds, z)
            if every and (index + 1) % every == 0:
                yield PreviewReady(index, self._preview(run, done.x0))
        yield from (Noted(summary) for summary in run.accelerations.summaries())
        return z

    def _preview(self, run: Run, x0: mx.array) -> np.ndarray:
        """The video as foreseen in the middle of denoising: uint8 [F, H, W, 3]."""
        vae, kept = load_vae(self.model), KeptFrames()
        for chunk in vae.decode_chunks(x0, run.settings.geometry.num_frames):
            kept.write(to_uint8(chunk))
        return kept.frames

    def _decode(self, run: Run, latents: mx.array) -> Generator[Event, None, Video]:
        """Latents to the finished video, 17 frames at a time straight into the file."""
        frames, plan = run.settings.geometry.num_frames, run.plan.stage("decode")
        yield StageStarted("decode", frames)
        with self._writer(run) as writer:
            with StageMeter("decode") as meter, self._lifetimes(run).stage(plan):
                vae = load_vae(self.model)
                chunks = vae.decode_chunks(latents, frames, plan.micro_batch, in_turn=plan.in_turn)
                del vae
                for chunk in chunks:
                    writer.write(to_uint8(chunk))
                    yield StageProgress("decode", writer.num_frames, frames)
                del chunks, chunk
            finished = run.close_stage(meter)
            if run.request.embed_metadata:
                writer.metadata = run.record()
        yield finished
        kept = writer.frames if isinstance(writer, KeptFrames) else None
        video = run.video(None if kept is not None else writer.path, kept)
        if video.path is not None and run.request.metadata:
            write_sidecar(video.path, video.metadata, run.request.overwrite)
        return video

    def _writer(self, run: Run) -> VideoWriter | KeptFrames:
        if run.output is None:
            return KeptFrames()
        settings = run.settings
        return open_writer(
            run.output,
            *settings.geometry.decoded,
            settings.fps,
            overwrite=run.request.overwrite,
        )


def bound(
    network: STDiT3,
    run: Run,
    context: Callable[[int, mx.array], Context[BlockPair]],
    text: Sequence[mx.array],
) -> Network:
    """The network for the video of `run` under one text [n, C] per sample.

    context: what fills the network's seams in a step (by index) at flow times t [B].
    """
    settings, geometry = run.settings, run.settings.geometry
    conditions = network.prepare(
        text,
        geometry.latent,
        height=geometry.size.height,
        width=geometry.size.width,
        fps=settings.conditioning_fps,
    )

    def velocity(z: mx.array, t: mx.array, x_mask: mx.array | None, index: int) -> mx.array:
        return network(z, t, conditions, x_mask, context(index, t))

    return velocity


def check_finite(z: mx.array, index: int) -> None:
    """Raise NumericsError where latents have left the numbers after step `index`."""
    if not mx.isfinite(z).all().item():
        raise NumericsError(
            f"NaN or Inf in the latents after denoising step {index + 1}.",
            "Try --dtype float32; if it stays, the weights may be damaged.",
        )
