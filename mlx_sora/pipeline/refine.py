"""Two passes (`--refine`): a small video, then the rest of the steps at a larger size.

The frames of the first pass are decoded, resized and encoded at the larger size, and get noise up
to flow time 1000 · strength (SDEdit, arXiv 2108.01073; the strength of img2img in diffusers). From
there the steps of the larger size's own schedule follow. Frames pass from one size to the other
chunk by chunk, so that memory does not grow with the length of the video.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_sora.conditioning.latents import ConditioningLatents
from mlx_sora.geometry import MICRO_FRAME_SIZE, check_tiles, plan_geometry, refined_size
from mlx_sora.memory.plan import MediaWorkload, Workload
from mlx_sora.models.vae import Chunk, MicroBatch, chunk_plan
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.networks import Stage, decoded_frames
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.pipeline.settings import ResolvedRequest
from mlx_sora.pipeline.stages import encode_chunks, shrink_if_over_budget
from mlx_sora.request.generation import REFINE_STRENGTH, GenerationRequest
from mlx_sora.runtime.events import Event, StageProgress, StageStarted
from mlx_sora.sampling.base import NOISE_TIME
from mlx_sora.sampling.noise import Noise, SecondPass
from mlx_sora.video.reader import ResizeCrop, resize_and_crop

if TYPE_CHECKING:
    import numpy as np

#: Most bytes of the first pass's frames in memory; more are decoded and encoded in parts.
PART_BYTES = 64 << 20


def second_pass(
    engine: Engine, request: GenerationRequest, first: ResolvedRequest
) -> ResolvedRequest:
    """Return the settings of the second pass. first: those of the first.

    Raises UsageError for a size that is smaller, or that is cut too much.
    """
    assert request.refine is not None, "there is no second pass"
    size = refined_size(first.geometry.size, request.refine)
    geometry = plan_geometry(size, first.geometry.num_frames)
    strength = request.refine_strength
    strength = REFINE_STRENGTH if strength is None else strength
    second = replace(
        first,
        geometry=geometry,
        media=first.media.with_size(size),
        vae_tiles=check_tiles(request.vae_tiles or 1, geometry),
        warnings=geometry.warnings,
    )
    times = engine.flow_times(second.sampler, second.steps, second.model_args)
    return replace(second, second_pass=_starting_step(times, strength, first))


def _starting_step(times: Sequence[float], strength: float, first: ResolvedRequest) -> SecondPass:
    """Return the step of the schedule that contains flow time 1000 · strength."""
    start, size = NOISE_TIME * strength, first.geometry.size
    if start == 0:
        return SecondPass(size, strength, len(times), 0.0)
    step = max(0, sum(t >= start for t in times) - 1)
    return SecondPass(size, strength, step, min(start, times[step]))


def frame_parts(first: ResolvedRequest) -> tuple[tuple[Chunk, ...], ...]:
    """Return the chunks of a clip of the first pass in parts of up to PART_BYTES of frames."""
    chunks = chunk_plan(first.clips.num_frames, MICRO_FRAME_SIZE)
    count = max(1, PART_BYTES // _frame_bytes(first, chunks[:1]))
    return tuple(tuple(chunks[i : i + count]) for i in range(0, len(chunks), count))


def _frame_bytes(first: ResolvedRequest, chunks: Sequence[Chunk]) -> int:
    return 3 * math.prod(first.geometry.decoded) * sum(chunk.frames for chunk in chunks)


def first_workload(workload: Workload, first: ResolvedRequest, second: GenerationRun) -> Workload:
    """Return the workload of the first pass, while the file of the second may be open."""
    waiting = _frame_bytes(first, frame_parts(first)[0])
    writer = second.workload.writer_bytes if first.clips.count > 1 else 0
    return replace(workload, suffix=None, scale=1, other_bytes=waiting + writer)


def second_workload(workload: Workload, first: ResolvedRequest) -> Workload:
    """Add the encoding of the first pass's frames to the workload of the second."""
    parts, pixels = frame_parts(first), math.prod(first.geometry.decoded)
    chunks = sum(len(part) for part in parts) * first.clips.count
    media = workload.media or MediaWorkload(0, 0, 0, videos=False)
    found = replace(
        media,
        chunks=media.chunks + chunks,
        chunk_frames=max(media.chunk_frames, parts[0][0].frames),
        source_pixels=max(media.source_pixels, pixels),
        waiting_bytes=_frame_bytes(first, parts[0]),
    )
    return replace(workload, media=found)


def join_passes(first: GenerationRun, second: GenerationRun) -> GenerationRun:
    """Return the run of both passes: the second, with the first inside and one common record."""
    text, *rest = second.plan.stages
    stages = (text, *(each for each in first.plan.stages if each.stage != "encode"), *rest)
    smallest = max(first.plan.smallest, second.plan.smallest)
    second.result.warnings[:0] = first.result.warnings
    previews = second.previews
    first = replace(
        first,
        notes=(),
        previews=previews and replace(previews, settings=first.settings),
        result=second.result,
        parts=frame_parts(first.settings),
    )
    return replace(
        second,
        first_pass=first,
        plan=replace(second.plan, stages=stages, smallest=smallest),
        notes=(*second.notes, _note(first, second)),
    )


def _note(first: GenerationRun, second: GenerationRun) -> str:
    settings = second.settings
    fit = ResizeCrop.from_sizes(first.settings.geometry.decoded, settings.geometry.decoded)
    steps, start = settings.steps - settings.first_step, settings.second_pass
    assert start is not None
    then = f"{steps} of {settings.steps} steps from t = {start.start:g}" if steps else "no steps"
    return f"second pass: {fit}; then {then}"


def enlarge(run: GenerationRun, latents: mx.array) -> Generator[Event, None, mx.array]:
    """Decode a clip of the first pass, resize its frames and encode them, part by part.

    run: of the second pass. latents: [1, T, h, w, C] of the first. Returns those at its own size.
    Rank 0 decodes and encodes for all.
    """
    first = run.first_pass
    assert first is not None, "there is no first pass"
    found = list[mx.array]()
    for part in first.parts:
        frames: list[np.ndarray] = []
        yield from _decode(first, latents, part, frames)
        yield StageStarted("read", len(part))
        with run.open_stage("read") as stage:
            found += yield from encode_chunks(run, stage, _resized(run, frames), len(part))
        yield run.result.add_stage(stage.meter)
    return mx.concatenate(found, axis=1)


def end_without_steps(
    run: GenerationRun, clip: int, conditioning: ConditioningLatents, first_pass: mx.array
) -> Generator[Event, None, mx.array]:
    """Return the first pass's latents [1, T, h, w, C] with the given frames: a strength of 0."""
    noise = Noise([run.settings.seed], first_pass.shape[1:], clip)
    z, _ = conditioning.initial_latents(clip, noise, first_pass, level=0.0)
    mx.eval(z)
    yield from run.finish_clip(z, run.accelerations)
    return z


def _resized(run: GenerationRun, frames: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield each chunk at the size of the run; drop it from the list."""
    size = run.settings.geometry.decoded
    while frames:
        yield resize_and_crop(frames.pop(0), size)


def _decode(
    first: GenerationRun, latents: mx.array, part: Sequence[Chunk], frames: list[np.ndarray]
) -> Generator[Event, None, None]:
    """Decode the chunks of a part into `frames`, uint8 [n, H, W, 3] each, on rank 0."""
    yield StageStarted("decode", sum(chunk.frames for chunk in part))
    with first.open_stage("decode") as stage:
        yield from first.ranks.stage_on_rank0(_decode_chunks(first, stage, latents, part, frames))
    yield first.result.add_stage(stage.meter)


def _decode_chunks(
    first: GenerationRun,
    stage: Stage,
    latents: mx.array,
    part: Sequence[Chunk],
    frames: list[np.ndarray],
) -> Generator[Event, None, None]:
    count, done, health = sum(chunk.frames for chunk in part), 0, first.health.frame_health()
    batch = MicroBatch(stage.plan.micro_batch or count)
    own = latents[:, part[0].latent : part[-1].latent + part[-1].latents]
    engine, tiles = first.engine, first.settings.vae_tiles
    for decoded in decoded_frames(
        engine.model, engine.precision.vae, stage, batch, own, count, tiles, health
    ):
        frames.append(decoded)
        done += len(decoded)
        yield StageProgress("decode", done, count)
        yield from shrink_if_over_budget(first.result, stage, batch.halve)
    health.finish()
