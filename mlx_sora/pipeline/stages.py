"""The stages of a run: encode_text, encode_media, denoise, decode.

Each is a generator of events that returns what it made. It builds its network, uses it, and frees
it before the next stage begins, so that a run needs the memory of its largest stage only. Of
several ranks, the first encodes text and media for all, all denoise one clip together or windows
side by side, and each decodes every n-th chunk of frames.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_sora.accel import Accelerations
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.conditioning.latents import ConditioningLatents, encode_tasks
from mlx_sora.distributed.group import Ranks
from mlx_sora.geometry import latent_frames
from mlx_sora.loading.file_guard import WeightFileGuard
from mlx_sora.loading.networks import load_vae
from mlx_sora.memory.plan import StagePlan
from mlx_sora.models.hooks import ValueSharing
from mlx_sora.models.stdit3 import BlockPair
from mlx_sora.models.vae import MicroBatch
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.networks import (
    ClipTransformer,
    Stage,
    StreamedTransformer,
    clip_text,
    load_decoder,
)
from mlx_sora.pipeline.run import GenerationRun, RunResult
from mlx_sora.runtime.events import (
    Event,
    Noted,
    StageProgress,
    StageStarted,
    StepFinished,
    Warned,
)
from mlx_sora.sampling import SAMPLERS, loop
from mlx_sora.sampling.base import Velocity
from mlx_sora.sampling.guidance import Guidance, GuidancePolicy, NoisedFrames
from mlx_sora.sampling.noise import Noise
from mlx_sora.sampling.windows import WindowedVelocity
from mlx_sora.text.encoder import encode_tokens
from mlx_sora.video.frames import FrameWriter, to_uint8

if TYPE_CHECKING:
    import numpy as np

#: Cleaned text to its T5 states [n, D].
TextStates = Mapping[str, mx.array]


def encode_text(
    runs: Sequence[GenerationRun], texts: MutableMapping[str, mx.array], ranks: Ranks
) -> Generator[Event, None, None]:
    """Encode all texts of `runs` into `texts`, on rank 0 of `ranks`; broadcast the states.

    The runs must agree in number format, memory limits and health checks.
    """
    todo = list(dict.fromkeys(text for run in runs for text in run.encodings))
    yield StageStarted("encode", len(todo))
    run = max(runs, key=lambda run: run.plan.stage("encode").peak)
    with run.open_stage("encode") as stage:
        found = yield from ranks.stage_on_rank0(_encode_texts(run, runs, todo, texts))
        warnings: dict[str, Sequence[str]] = ranks.broadcast_object(found)
        if ranks.size > 1:
            for text in todo:
                states = ranks.broadcast(texts[text] if ranks.is_rank0 else None)
                if not ranks.is_rank0:
                    texts[text] = states
    for each in runs:
        own = [line for text in each.encodings for line in warnings[text]]
        each.result.warnings += own
        yield from map(Warned, own)
        finished = each.result.add_stage(stage.meter, len(runs))
    yield finished


def _encode_texts(
    run: GenerationRun,
    runs: Sequence[GenerationRun],
    todo: Sequence[str],
    texts: MutableMapping[str, mx.array],
) -> Generator[Event, None, dict[str, Sequence[str]]]:
    """Encode `todo` with the T5 of `run`, or take it from the text cache.

    Returns the warnings of each text.
    """
    encodings = {text: encoding for each in runs for text, encoding in each.encodings.items()}
    cache, missing = run.text_cache, list[str]()
    for text in todo:
        states = cache.get(encodings[text].ids)
        if states is None:
            missing.append(text)
            continue
        run.health.check_text(states)
        texts[text] = states
        yield StageProgress("encode", len(texts), len(todo))
    if missing:
        with run.loader.text_encoder(run.plan.stage("encode")) as (network, rows, blocks):
            dtype = run.engine.precision.text_encoder
            for text in missing:
                ids = encodings[text].ids
                states = encode_tokens(network, rows, ids, dtype, blocks)
                run.health.check_text(states)
                texts[text] = states
                cache.put(ids, states)
                yield StageProgress("encode", len(texts), len(todo))
            for each in runs:
                each.result.add_stream("encode", blocks)
        cache.prune()
    return {text: encodings[text].warnings for text in todo}


def encode_media(run: GenerationRun) -> Generator[Event, None, ConditioningLatents]:
    """Encode the images and videos of the request, on rank 0; broadcast their latents."""
    settings = run.settings
    channels = run.engine.transformer_config.in_channels
    conditioning = ConditioningLatents(settings.media, settings.latent, channels)
    tasks = encode_tasks(settings.media, settings.geometry.size)
    if not tasks:
        return conditioning
    yield from map(Noted, settings.media.notes)
    yield StageStarted("read", len(tasks))
    with run.open_stage("read") as stage:
        latents = yield from encode_chunks(run, stage, (task.read() for task in tasks), len(tasks))
        for task, encoded in zip(tasks, latents, strict=True):
            conditioning.set_latents(task, encoded)
        del latents, encoded
    yield run.result.add_stage(stage.meter)
    return conditioning


def encode_chunks(
    run: GenerationRun, stage: Stage, chunks: Iterator[np.ndarray], count: int
) -> Generator[Event, None, list[mx.array]]:
    """Encode `count` chunks, uint8 [F, H, W, 3], to latents [1, T, h, w, C] on rank 0; broadcast.

    Each chunk is read when its turn comes.
    """
    stage_on_rank0 = run.ranks.stage_on_rank0(_encode_chunks(run, stage, chunks, count))
    latents: Sequence[mx.array | None] = (yield from stage_on_rank0) or [None] * count
    return [run.ranks.broadcast(each) for each in latents]


def _encode_chunks(
    run: GenerationRun, stage: Stage, chunks: Iterator[np.ndarray], count: int
) -> Generator[Event, None, list[mx.array]]:
    encoded = list[mx.array]()
    for each in encode_pixels(run.engine, stage.plan, chunks):
        run.health.check_media(each)
        encoded.append(each)
        yield StageProgress("read", len(encoded), count)
    return encoded


def encode_pixels(
    engine: Engine, plan: StagePlan, chunks: Iterator[np.ndarray]
) -> Iterator[mx.array]:
    """Encode chunks, uint8 [F, H, W, 3], one at a time to latents [1, T, h, w, C]."""
    with WeightFileGuard(engine.model.vae).check_reads():
        vae = load_vae(engine.model, ("encoder",), engine.precision.vae)
        pixels = (mx.array(chunk).astype(mx.float32) / 127.5 - 1 for chunk in chunks)
        latents = vae.encode_chunks(
            pixels, plan.micro_batch, sequential_offload=plan.sequential_offload
        )
        del vae
        yield from latents


def denoise(
    run: GenerationRun,
    clip: int,
    texts: TextStates,
    conditioning: ConditioningLatents,
    first_pass: mx.array | None = None,
) -> Generator[Event, None, mx.array]:
    """Denoise one clip to latents [1, T, H, W, C].

    first_pass: latents that a second pass begins with, of the same shape.
    """
    yield StageStarted("denoise", run.settings.steps_to_make)
    with run.open_stage("denoise") as stage:
        latents = yield from _denoise_steps(run, stage, clip, texts, conditioning, first_pass)
    yield run.result.add_stage(stage.meter)
    return latents


def _denoise_steps(
    run: GenerationRun,
    stage: Stage,
    clip: int,
    texts: TextStates,
    conditioning: ConditioningLatents,
    first_pass: mx.array | None,
) -> Generator[Event, None, mx.array]:
    """Make the steps of a clip that are left; yield the events of each."""
    settings = run.settings
    accelerations, snapshot = run.begin_clip(clip)
    with open_transformer(run, stage) as transformer, run.checkpoints.save_on_error():
        blocks, first = transformer[1], settings.first_step
        shape = (*settings.latent, transformer[0].config.in_channels)
        noise = Noise([settings.seed], shape, clip)
        z, given = conditioning.initial_latents(clip, noise, first_pass, settings.noise_level)
        noised = noised_frames(run, noise) if given else None
        restored = loop.RestoredSteps(first, {"sampler": {}, "policy": {}}) if first else None
        if snapshot is not None and snapshot.latents is not None and snapshot.state is not None:
            z, restored = snapshot.latents, loop.RestoredSteps(snapshot.steps, snapshot.state)
        sampler = SAMPLERS[settings.sampler]
        for step in loop.denoise(
            clip_velocity(run, transformer, texts, clip, accelerations, noised),
            z,
            settings.starting_times(sampler),
            sampler,
            policy=accelerations.policy,
            conditioning=given,
            restored=restored,
        ):
            z, index, total = step.z, step.step.index, step.step.total
            run.health.check_latents(z, index, total, conditioned=given is not None)
            yield from run.finish_step(step, accelerations)
            remeasure_if_merging_changes(blocks, accelerations, index, index + 1)
            yield StepFinished(index - first, total - first, step.t, step.seconds, z)
            if run.previews is not None and run.ranks.is_rank0:
                yield from run.previews.after(clip, index, step.x0)
            if blocks is not None:
                yield from shrink_if_over_budget(run.result, stage, blocks.shrink)
        yield from map(Noted, accelerations.summaries())
        run.result.add_stream("denoise", blocks)
    return z


@contextmanager
def open_transformer(run: GenerationRun, stage: Stage) -> Iterator[StreamedTransformer]:
    """Open the transformer on all ranks, or raise on all."""
    with ExitStack() as opened:
        with run.ranks.collective_errors():
            transformer = opened.enter_context(run.loader.transformer(stage.plan))
        yield transformer


def clip_transformer(
    run: GenerationRun,
    transformer: StreamedTransformer,
    accelerations: Accelerations,
    value_sharing: Callable[[int, float], ValueSharing | None] | None = None,
) -> ClipTransformer:
    """Give the transformer the sizes of a clip and the hooks of the run's techniques."""
    settings = run.settings
    return ClipTransformer(
        transformer,
        settings.model_args,
        settings.geometry.latent,
        accelerations,
        run.sharding,
        value_sharing,
        on_block=run.on_block,
    )


def clip_guidance(
    run: GenerationRun,
    model: ClipTransformer,
    texts: TextStates,
    clip: int = 0,
    policy: GuidancePolicy | None = None,
) -> Guidance:
    """Return the guided velocity of a clip under its own text."""
    settings, null_text = run.settings, model.transformer[0].null_text
    if settings.negative is not None:
        negative = texts[settings.negative]
        null_text = lambda length: negative  # noqa: E731
    # With CFG parallelism each rank already computes one prediction.
    sequential = run.request.sequential_guidance and run.parallel.cfg_degree == 1
    text = [clip_text(settings, clip, texts)]
    return Guidance(model, text, null_text, settings.guidance, sequential, policy)


def noised_frames(run: GenerationRun, noise: Noise) -> NoisedFrames | None:
    """Return how predictions see the given frames of a clip; None: as they are."""
    mode = run.request.image_guidance
    return None if mode == "clean" else NoisedFrames(noise.initial(), cond=mode == "noised")


def clip_velocity(
    run: GenerationRun,
    transformer: StreamedTransformer,
    texts: TextStates,
    clip: int,
    accelerations: Accelerations,
    noised: NoisedFrames | None = None,
) -> Velocity:
    """Return the guided velocity of a clip, or of its windows, each with text and techniques."""
    model, windows = clip_transformer(run, transformer, accelerations), run.settings.windows
    if windows is None:
        guidance = clip_guidance(run, model, texts, clip, accelerations.guidance)
        return replace(guidance, noised=noised)
    by_text = {
        text: clip_guidance(run, model, texts, i) for i, text in enumerate(run.settings.texts)
    }
    velocities = []
    for index, text in enumerate(run.settings.texts):
        techniques = accelerations.windows[index]
        own = replace(model, accelerations=techniques)
        seen = None if noised is None else noised.select(windows.span(index))
        velocities.append(
            replace(by_text[text], model=own, policy=techniques.guidance, noised=seen)
        )
    ranks = run.ranks if run.parallel.window_degree > 1 else Ranks()
    return WindowedVelocity(windows, velocities, ranks.rank, ranks.size, ranks.all_gather)


def remeasure_if_merging_changes(
    blocks: BlockStream[BlockPair] | None, accelerations: Accelerations, step: int, following: int
) -> None:
    """Have the stream measure memory again if the following step merges tokens and `step` not."""
    if blocks is None or following < 0:
        return
    merging = [accelerations.token_merging(each) is not None for each in (step, following)]
    if merging[0] != merging[1]:
        blocks.remeasure()


def shrink_if_over_budget(
    result: RunResult, stage: Stage, shrink: Callable[[], bool]
) -> Iterator[Event]:
    """Call `shrink` if the process has outgrown its memory budget; warn once."""
    warning = stage.monitor.check(shrink)
    if warning is not None:
        result.warnings.append(warning)
        yield Warned(warning)


def decode(
    run: GenerationRun, clip: int, latents: mx.array, writer: FrameWriter
) -> Generator[Event, None, None]:
    """Decode the new frames of a clip, one chunk of 17 frames at a time, straight into the file."""
    clips = run.settings.clips
    skipped = clips.frames_to_skip(clip)
    frames, before = clips.num_frames - skipped, writer.num_frames
    yield StageStarted("decode", frames)
    with run.open_stage("decode") as stage:
        # The VAE decodes chunks independently, so frames of the clip before can be left out.
        new_latents = latents[:, latent_frames(skipped) :]
        batch = MicroBatch(stage.plan.micro_batch or frames)
        for chunk in _decoded_chunks(run, stage, batch, new_latents, frames):
            with run.ranks.collective_errors():
                writer.write(chunk)
            yield StageProgress("decode", writer.num_frames - before, frames)
            yield from shrink_if_over_budget(run.result, stage, batch.halve)
        del chunk
    yield run.result.add_stage(stage.meter)


def _decoded_chunks(
    run: GenerationRun, stage: Stage, batch: MicroBatch, latents: mx.array, count: int
) -> Iterator[np.ndarray]:
    """Decode latents to `count` frames, uint8 [n, H, W, 3] each; ranks decode side by side."""
    ranks, model = run.ranks, run.engine.model
    with ranks.collective_errors():
        files = WeightFileGuard(model.vae)
        vae, open_blocks = load_decoder(
            model, run.engine.precision.vae, stage.plan, run.result.add_stream
        )
    total = len(vae.chunks(count))
    chunks = vae.decode_chunks(
        latents,
        count,
        batch,
        sequential_offload=stage.plan.sequential_offload,
        open_blocks=open_blocks,
        tiles=run.settings.vae_tiles,
        selection=slice(ranks.rank, None, ranks.size),
    )
    del vae
    health = run.health.frame_health()
    for first in range(0, total, ranks.size):
        frames = None
        with ranks.collective_errors(), files.check_reads():
            if first + ranks.rank < total:
                chunk = next(chunks)
                health.add(chunk)
                frames = to_uint8(chunk)
                del chunk
        yield from ranks.all_gather_frames(frames, run.settings.geometry.decoded)
    ranks.raise_if_all_fail(health.finish)
