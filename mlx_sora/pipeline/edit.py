"""Editing a video: encode it, invert the flow to noise, denoise under the new prompt, decode.

The VAE turns the video into latents. The flow is followed from them back to noise, under a prompt
for what they show (RF-Solver, arXiv 2411.04746), and forward again under the new prompt. What the
new prompt does not change comes out as it was; the more exactly the flow is followed, the better.
In the first steps, attention within frames uses the values of the inversion
(`accel/value_sharing.py`), which preserves the layout.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_sora.accel.value_sharing import CapturedValues, captured_bytes
from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import UsageError
from mlx_sora.memory.plan import MediaWorkload
from mlx_sora.memory.profiles import format_bytes
from mlx_sora.models.hooks import ValueSharing
from mlx_sora.models.vae import Chunk, chunk_plan
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.generate import finished_video, open_run_writer, plan_run, planned_run
from mlx_sora.pipeline.locks import run_exclusively
from mlx_sora.pipeline.networks import StreamedTransformer
from mlx_sora.pipeline.run import EditSource, GenerationRun
from mlx_sora.pipeline.settings import SOURCE, resolve
from mlx_sora.pipeline.stages import (
    TextStates,
    clip_guidance,
    clip_transformer,
    decode,
    encode_chunks,
    encode_text,
    open_transformer,
    remeasure_if_merging_changes,
)
from mlx_sora.pipeline.text_warnings import ineffective_texts
from mlx_sora.request.edit import EditRequest
from mlx_sora.runtime.events import Event, Finished, Noted, StageStarted, StepFinished
from mlx_sora.sampling import SAMPLERS
from mlx_sora.sampling.guidance import Guidance
from mlx_sora.sampling.loop import denoise as denoise_steps
from mlx_sora.text.prompt import prepare_prompt
from mlx_sora.video.output_path import check_inputs
from mlx_sora.video.reader import (
    ResizeCrop,
    VideoInfo,
    probe_medium,
    read_image,
    read_video,
)

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class EditRun:
    """Plan of one edit: the run that makes the new video, and its source.

    video: properties of the source, None for an image. chunks: pieces of the video that are encoded
    one after the other.
    """

    path: str
    video: VideoInfo | None
    source: EditSource
    run: GenerationRun
    chunks: Sequence[Chunk]


def prepare_edit(engine: Engine, edit: EditRequest) -> EditRun:
    """Decide everything about an edit. Reads no weights, and of the video only its index.

    Raises UsageError for a video that cannot be edited, and as `prepare` does.
    """
    edit.validate()
    size, frames, fps, info = probe_medium(edit.video, engine.model.defaults.fps)
    request = edit.resolved_target(frames, fps).with_preset()
    engine = engine.for_request(request)
    resolved = resolve(request, engine.model, loops=False)
    geometry = resolved.geometry
    if geometry.num_frames > frames:
        raise UsageError(
            f"{edit.video} has {frames} frames, {geometry.num_frames} were asked for.",
            f"Give --num-frames {frames} or less.",
        )
    steps = edit.resolved_inject_steps(resolved.steps)
    vae = engine.vae_config
    chunks = chunk_plan(geometry.num_frames, vae.micro_frame_size, vae.temporal.factor)
    evaluations = steps * SAMPLERS[resolved.sampler].evaluations
    prompt = prepare_prompt(edit.source_prompt, resolved.scores)
    if prompt.segments:
        raise UsageError("A source prompt has no ranges of frames.", "Describe the whole video.")
    source = EditSource(
        text=prompt.text(),
        inject_steps=steps,
        captured=captured_bytes(engine.transformer_config, geometry.latent, evaluations, 1),
        media=MediaWorkload(
            len(chunks), chunks[0].frames, math.prod(size), videos=info is not None
        ),
    )
    add_source = partial(source.add_to, dtype=engine.precision.transformer)
    run = plan_run(engine, request, resolved, source, add_source)
    if run.output is not None:
        check_inputs(run.output, [edit.video], sidecar=request.metadata)
    if info is not None:
        run.result.warnings.extend(info.warnings)
        run = replace(run, notes=(*run.notes, *info.notes))
    run.result.metadata["edit"] = _metadata(edit, steps)
    subjects = {SOURCE: prompt.subjects[0]}
    run.result.warnings += ineffective_texts(subjects, engine.tokenizer)
    fit = ResizeCrop.from_sizes(size, geometry.decoded)
    if fit.source != fit.size:
        run.result.warnings.append(f"{edit.video}: {fit}.")
    return EditRun(edit.video, info, source, run, chunks)


def stream_edit(engine: Engine, edit: EditRequest) -> Generator[Event, None, None]:
    """Yield the events of an edit, `Finished` last. Bad requests raise here, before any work."""
    ranks = Ranks() if edit.target.parallel == "off" else engine.ranks
    with ranks.watchdog_scope():
        if ranks.size > 1:
            engine.check_equal([edit.target], **_metadata(edit, edit.inject_steps))
        with ranks.collective_errors():
            prepared = prepare_edit(engine, edit)
    run, path = prepared.run, engine.model.path
    events = run_exclusively(path, run.output, edit_video(prepared), ranks)
    return ranks.watch_events(events)


def edit_video(edit: EditRun) -> Generator[Event, None, None]:
    """Carry out an edit; yield its events."""
    run, texts = edit.run, dict[str, mx.array]()
    yield from run.opening_events()
    yield planned_run(run)
    yield from encode_text([run], texts, run.ranks)
    latents = yield from _encode_video(edit)
    latents = yield from _invert_and_regenerate(edit, latents, texts)
    with open_run_writer(run) as writer:
        yield from decode(run, 0, latents, writer)
    yield Finished(finished_video(run, writer))


def _encode_video(edit: EditRun) -> Generator[Event, None, mx.array]:
    """Encode the video, chunk by chunk, to latents [1, T, h, w, C]."""
    run = edit.run
    yield StageStarted("read", len(edit.chunks))
    with run.open_stage("read") as stage:
        encoded = yield from encode_chunks(run, stage, _chunk_frames(edit), len(edit.chunks))
        latents = mx.concatenate(encoded, axis=1)
        mx.eval(latents)
        del encoded
    yield run.result.add_stage(stage.meter)
    return latents


def _chunk_frames(edit: EditRun) -> Iterator[np.ndarray]:
    """Yield the frames of each chunk, filled into the video's size: uint8 [F, H, W, 3]."""
    geometry = edit.run.settings.geometry
    if edit.video is not None:
        num_frames, size = geometry.num_frames, geometry.decoded
        frames = read_video(edit.path, num_frames, size=size, info=edit.video).frames
    else:
        frames = read_image(edit.path, geometry.decoded)[None]
    for chunk in edit.chunks:
        yield frames[chunk.frame : chunk.frame + chunk.frames]


def _invert_and_regenerate(
    edit: EditRun, latents: mx.array, texts: TextStates
) -> Generator[Event, None, mx.array]:
    run = edit.run
    yield StageStarted("denoise", 2 * run.settings.steps)
    with run.open_stage("denoise") as stage:
        with open_transformer(run, stage) as transformer:
            flow = FlowEdit(run, transformer, edit.source.inject_steps)
            noise = yield from flow.invert(latents, texts[edit.source.text])
            latents = yield from flow.regenerate(noise, texts)
            run.result.add_stream("denoise", transformer[1])
        del transformer, flow, noise
    yield run.result.add_stage(stage.meter)
    return latents


class FlowEdit:
    """Both directions of an edit along the flow, with the values that they share.

    Step i of the inversion covers the times of step N - 1 - i of the regeneration.
    """

    def __init__(
        self, run: GenerationRun, transformer: StreamedTransformer, inject_steps: int
    ) -> None:
        self._run, self._transformer = run, transformer
        self._steps, self._inject_steps = run.settings.steps, inject_steps
        self._values = CapturedValues()
        self._sampler = SAMPLERS[run.settings.sampler]

    @cached_property
    def _times(self) -> mx.array:
        return self._sampler.timesteps(self._steps, **self._run.settings.model_args.sizes)

    def invert(self, z: mx.array, text: mx.array) -> Generator[Event, None, mx.array]:
        """Follow the flow from latents z back to noise, under `text`; capture values.

        Without guidance, whose flow does not lead back.
        """

        def capture(step: int, t: float) -> ValueSharing | None:
            return self._values.capture(t) if step < self._inject_steps else None

        run = self._run
        model = clip_transformer(run, self._transformer, run.accelerations, capture)
        model = replace(model, inverted_steps=self._steps)
        velocity = Guidance(model, [text], self._transformer[0].null_text, 1.0)
        for step in denoise_steps(velocity, z, self._times[::-1], self._sampler):
            z, index = step.z, self._steps - 1 - step.step.index
            run.health.check_latents(z, step.step.index, self._steps, conditioned=True)
            self._remeasure(index, index - 1)
            yield StepFinished(step.step.index, 2 * self._steps, step.t, step.seconds, z)
        if self._values.evaluations:
            yield Noted(
                f"attention values of {self._values.evaluations} evaluations kept in memory: "
                f"{format_bytes(self._values.nbytes)}"
            )
        return z

    def regenerate(self, z: mx.array, texts: TextStates) -> Generator[Event, None, mx.array]:
        """Follow the flow from noise z to latents, under the new prompt; reuse the values."""

        def reuse(step: int, t: float) -> ValueSharing | None:
            return self._values.reuse(t) if step < self._inject_steps else None

        run, accelerations = self._run, self._run.accelerations
        blocks = self._transformer[1]
        if blocks is not None:
            blocks.remeasure()  # guidance takes more memory than the inversion did
        model = clip_transformer(run, self._transformer, accelerations, reuse)
        velocity = clip_guidance(run, model, texts)
        policy = accelerations.policy
        for step in denoise_steps(velocity, z, self._times, self._sampler, policy=policy):
            z, index = step.z, step.step.index
            run.health.check_latents(z, index, self._steps, conditioned=True)
            accelerations.on_step_end(step)
            self._remeasure(index, index + 1)
            if index + 1 == self._inject_steps:
                self._values.clear()
            yield StepFinished(self._steps + index, 2 * self._steps, step.t, step.seconds, z)
        yield from map(Noted, accelerations.summaries())
        return z

    def _remeasure(self, step: int, following: int) -> None:
        blocks = self._transformer[1]
        remeasure_if_merging_changes(blocks, self._run.accelerations, step, following)


def _metadata(edit: EditRequest, inject_steps: int | None) -> dict[str, Any]:
    return {"video": edit.video, "source_prompt": edit.source_prompt, "inject_steps": inject_steps}
