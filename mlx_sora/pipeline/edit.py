"""A video and a new prompt in, the changed video out: encode, invert, denoise, decode.

The VAE turns the video into latents; the flow is followed from them back to the noise they could
have come from, under a prompt for what they show (RF-Solver, arXiv 2411.04746); from that noise it
is followed again under the new prompt. What the new prompt does not change comes out as it was, the
better the more exactly the flow is followed. In the first steps attention within frames uses the
values of the inversion (`accel/value_sharing.py`), which holds the layout.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_sora.accel import Accelerations
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.accel.value_sharing import CapturedValues, captured_bytes
from mlx_sora.distributed.partition import ParallelPlan
from mlx_sora.errors import UsageError
from mlx_sora.geometry import Size
from mlx_sora.memory.limits import StageMeter
from mlx_sora.memory.plan import MediaWorkload, Plan, Workload
from mlx_sora.memory.profiles import format_bytes
from mlx_sora.models.hooks import Hooks
from mlx_sora.models.stdit3 import BlockPair, STDiT3, STDiT3Config
from mlx_sora.models.vae import Chunk, VAEConfig, chunk_plan
from mlx_sora.pipeline.locks import run_exclusively
from mlx_sora.pipeline.pipeline import Pipeline
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.pipeline.settings import ResolvedRequest, resolve
from mlx_sora.pipeline.stages import Texts, bound
from mlx_sora.request.edit import EditRequest
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.device import default_dtype
from mlx_sora.runtime.events import (
    Event,
    Finished,
    Noted,
    StageStarted,
    StepFinished,
    Warned,
)
from mlx_sora.sampling import SAMPLERS
from mlx_sora.sampling.guidance import guided
from mlx_sora.sampling.loop import StepResult, denoise
from mlx_sora.text.tokenizer import Tokenizer
from mlx_sora.video.reader import Fit, image_size, is_video, probe_video, read_image, read_video

if TYPE_CHECKING:
    import numpy as np


class Editing(Pipeline):
    """One edit with the model of a pipeline."""

    def __init__(self, pipeline: Pipeline, edit: EditRequest) -> None:
        """Looks at the video's index; raises UsageError for what cannot be edited."""
        super().__init__(pipeline.model, pipeline.dtype)
        edit.validate()
        self._edit = edit
        self._size, frames, fps = _look_at(edit.video, self.model.defaults.fps)
        self._request = edit.resolved_target(frames, fps)
        source, _ = resolve(replace(self._request, prompt=edit.source_prompt), self.model)
        if source.geometry.num_frames > frames:
            raise UsageError(
                f"{edit.video} has {frames} frames, {source.geometry.num_frames} were asked for.",
                f"Give --num-frames {frames} or less.",
            )
        self._source_text = source.text
        self._injected = edit.resolved_inject_steps(source.steps)

    def events(self) -> Generator[Event, None, None]:
        """Events of the edit, `Finished` the last. Bad requests raise here, before any work."""
        ranks = self._ranks(self._request)
        with ranks.watchdog_scope():
            self._agree(ranks, [self._request], **self._told)
            with ranks.collective_errors():
                run = self._begin()
        return ranks.watch_events(run_exclusively(run.output, self._events(run), ranks))

    def needs(self) -> Plan:
        """What the edit would need, stage by stage, without making it."""
        return self._begin().plan

    @property
    def _told(self) -> dict[str, Any]:
        """What an edit is besides a request."""
        return {
            "video": self._edit.video,
            "source_prompt": self._edit.source_prompt,
            "inject_steps": self._injected,
        }

    def _begin(self) -> GenerationRun:
        run = self._prepare(self._request)
        run.more["edit"] = self._told
        fit = Fit.of(self._size, run.settings.geometry.decoded)
        if fit.source != fit.size:
            run.warnings.append(f"{self._edit.video}: {fit}.")
        return run

    def _work(
        self,
        request: GenerationRequest,
        settings: ResolvedRequest,
        accelerations: Accelerations,
        text_tokens: int,
    ) -> Workload:
        work = super()._work(request, settings, accelerations, text_tokens)
        config = STDiT3Config.from_dict(self.model.config("transformer"))
        dtype = default_dtype(requested=self.dtype if request.dtype == "auto" else request.dtype)
        kept = self._injected * SAMPLERS[settings.sampler].evaluations
        source = Tokenizer.load(self.model.tokenizer).encode(self._source_text)
        chunks = self._chunks(settings)
        return replace(
            work,
            text_tokens=max(text_tokens, len(source.ids)),
            inverts=True,
            captured_bytes=captured_bytes(config, settings.geometry.latent, kept, dtype.size),
            media=MediaWorkload(len(chunks), chunks[0].frames, math.prod(self._size)),
        )

    def _division(self, request: GenerationRequest, settings: ResolvedRequest) -> ParallelPlan:
        """Values are kept by those who share them again, which halves would change."""
        division = super()._division(request, settings)
        if not self._injected or division.cfg_degree == 1:
            return division
        if request.parallel != "auto":
            raise UsageError(
                f"--parallel {request.parallel} does not go with injected values.",
                "Use --parallel sequence, or --inject-steps 0.",
            )
        return ParallelPlan(division.ranks)

    def _chunks(self, settings: ResolvedRequest) -> list[Chunk]:
        """Pieces of the video that are encoded one after the other."""
        config = VAEConfig.from_dict(self.model.config("vae"))
        frames = settings.geometry.num_frames
        return chunk_plan(frames, config.micro_frame_size, config.temporal.factor)

    def _events(self, run: GenerationRun) -> Generator[Event, None, None]:
        yield from (Warned(warning) for warning in run.warnings)
        texts: dict[str, mx.array] = {}
        yield from self._encode([run], texts, also=[self._source_text])
        latents = yield from self._encode_video(run)
        yield StageStarted("denoise", 2 * run.settings.steps)
        plan, lifetimes = run.plan.stage("denoise"), self._lifetimes(run)
        with StageMeter("denoise") as meter, lifetimes.stage(plan):
            with self._transformer(run) as (network, blocks):
                way = _Way(run, network, blocks, self._injected)
                latents = yield from way.back(latents, texts[self._source_text])
                latents = yield from way.forth(latents, texts)
                run.note_stream("denoise", blocks)
            del network, blocks, way
        yield run.close_stage(meter)
        yield Finished((yield from self._decode(run, latents)))

    def _encode_video(self, run: GenerationRun) -> Generator[Event, None, mx.array]:
        """Latents of the source, [1, T, h, w, C], chunk by chunk."""
        chunks, plan = self._chunks(run.settings), run.plan.stage("read")
        yield StageStarted("read", len(chunks))
        latents = None
        with StageMeter("read") as meter, self._lifetimes(run).stage(plan):
            with run.ranks.collective_errors():
                if run.ranks.is_rank0:
                    geometry = run.settings.geometry
                    frames = _frames(self._edit.video, geometry.num_frames, geometry.decoded)
                    parts = (frames[c.frame : c.frame + c.frames] for c in chunks)
                    encoded = yield from self._encoded(run, plan, parts, len(chunks))
                    latents = mx.concatenate(encoded, axis=1)
                    del encoded, parts, frames
            latents = run.ranks.broadcast(latents)
        yield run.close_stage(meter)
        return latents


class _Way:
    """The way from a video to its noise, and from there to the new one, step by step alike.

    Step i of the way back covers the times of step N - 1 - i of the way forth.
    """

    def __init__(
        self,
        run: GenerationRun,
        network: STDiT3,
        blocks: BlockStream[BlockPair] | None,
        injected: int,
    ) -> None:
        self._run, self._network, self._blocks = run, network, blocks
        self._steps, self._injected = run.settings.steps, injected
        self._kept = CapturedValues()
        self._sampler = SAMPLERS[run.settings.sampler]
        self._times = self._sampler.timesteps(self._steps, **run.settings.model_args.sizes)

    def back(self, z: mx.array, text: mx.array) -> Generator[Event, None, mx.array]:
        """The noise that latents z come from under `text`; keeps the values nearest to it.

        Without guidance, whose flow does not lead back.
        """

        def context(index: int, t: mx.array) -> Hooks[BlockPair]:
            step = self._steps - 1 - index
            plain = self._run.accelerations.hooks(step, self._blocks)
            keeps = step < self._injected
            return replace(plain, value_sharing=self._kept.capture(_time(t))) if keeps else plain

        velocity = guided(
            partial(bound, self._network, self._run, context), [text], self._network.null_text, 1.0
        )
        for done in denoise(velocity, z, self._times[::-1], self._sampler):
            z = self._check(done)
            step = self._steps - 1 - done.step.index
            self._next_is(step, step - 1)
            yield StepFinished(done.step.index, 2 * self._steps, done.t, done.seconds, z)
        if self._kept.evaluations:
            yield Noted(
                f"values of {self._kept.evaluations} evaluations kept: "
                f"{format_bytes(self._kept.nbytes)}"
            )
        return z

    def forth(self, z: mx.array, texts: Texts) -> Generator[Event, None, mx.array]:
        """The latents that the noise z leads to under the new prompt."""
        run, accelerations = self._run, self._run.accelerations
        settings = run.settings
        negative = None if settings.negative is None else texts[settings.negative]

        def context(index: int, t: mx.array) -> Hooks[BlockPair]:
            plain = accelerations.hooks(index, self._blocks)
            shares = index < self._injected
            return replace(plain, value_sharing=self._kept.reuse(_time(t))) if shares else plain

        velocity = guided(
            partial(bound, self._network, run, context),
            [texts[settings.text]],
            self._network.null_text if negative is None else lambda n: negative,
            settings.guidance,
            sequential=run.request.sequential_guidance and run.division.cfg_degree == 1,
        )
        if self._blocks is not None:
            self._blocks.remeasure()  # guidance takes more memory than the way back did
        for done in denoise(velocity, z, self._times, self._sampler, policy=accelerations.policy):
            z, index = self._check(done), done.step.index
            accelerations.on_step_end(done)
            self._next_is(index, index + 1)
            if index + 1 == self._injected:
                self._kept.clear()
            at = self._steps + index
            yield StepFinished(at, 2 * self._steps, done.t, done.seconds, z)
        yield from (Noted(summary) for summary in accelerations.summaries())
        return z

    def _check(self, done: StepResult) -> mx.array:
        run, total = self._run, done.step.total
        run.health.latents(done.z, done.step.index, total, given=True)
        return done.z

    def _next_is(self, step: int, following: int) -> None:
        """Where the next step merges tokens and this one does not, or the reverse, say so."""
        merges = self._run.accelerations.merges_tokens
        if self._blocks is not None and following >= 0 and merges(step) != merges(following):
            self._blocks.remeasure()


def _time(t: mx.array) -> float:
    """Flow time of the first sample."""
    return float(t[0].item())  # type: ignore[arg-type]


def _look_at(path: str, still_fps: float) -> tuple[Size, int, float]:
    """Size, frames and fps of a video or picture; `still_fps` for a picture. Raises UsageError."""
    if not is_video(path):
        return image_size(path), 1, still_fps
    info = probe_video(path)
    return info.size, info.num_frames, round(info.fps, 3)


def _frames(path: str, count: int, size: Size) -> np.ndarray:
    """The first `count` frames, filled into `size`: uint8 [F, H, W, 3]."""
    if not is_video(path):
        return read_image(path, size)[None]
    return read_video(path, count, size=size).frames
