"""Generation of one request: prepare() plans the run, generate() carries it out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_sora.accel import Accelerations
from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.conditioning.latents import ConditioningLatents, media_workload
from mlx_sora.distributed.partition import ParallelPlan, choose_parallel
from mlx_sora.errors import MemoryBudgetError, UsageError
from mlx_sora.memory.budget import is_automatic
from mlx_sora.memory.plan import Plan, StepVariant, Workload
from mlx_sora.memory.planner import LargeArrayError, make_plan
from mlx_sora.memory.profiles import format_bytes
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.planned_stages import planned_encoding, planned_stages
from mlx_sora.pipeline.preview import Previews
from mlx_sora.pipeline.refine import (
    end_without_steps,
    enlarge,
    first_workload,
    join_passes,
    second_pass,
    second_workload,
)
from mlx_sora.pipeline.resume import with_checkpoints
from mlx_sora.pipeline.run import EditSource, GenerationRun, RunResult
from mlx_sora.pipeline.settings import (
    ResolvedRequest,
    resolve,
)
from mlx_sora.pipeline.stages import (
    TextStates,
    decode,
    denoise,
    encode_media,
    encode_text,
)
from mlx_sora.pipeline.text_warnings import ineffective_texts, untrained_warning
from mlx_sora.request.generation import GenerationRequest, with_sources
from mlx_sora.runtime.events import Event, RunPlanned
from mlx_sora.sampling import SAMPLERS
from mlx_sora.utils.leftovers import deferred_signals
from mlx_sora.video import Video
from mlx_sora.video.containers import MAX_PIXELS
from mlx_sora.video.frames import FrameCounter, FramesInMemory, FrameWriter
from mlx_sora.video.output_path import (
    check_inputs,
    check_output,
    checkpoint_path,
    output_path,
)
from mlx_sora.video.preview import preview_path, refuse_other_file
from mlx_sora.video.writer import open_writer, write_sidecar

#: Longest side that WebP and H.264 have.
MAX_SIDE = 16383


def prepare(
    engine: Engine, request: GenerationRequest, resume: Path | None = None
) -> GenerationRun:
    """Decide everything about a validated request that has a seed. Reads no weights.

    resume: a checkpoint to continue from. Raises UsageError, WeightsError, and MemoryBudgetError
    with the smallest budget that would do.
    """
    sources = request.preset_sources()
    request = request.with_preset()
    engine = engine.for_request(request)
    resolved = resolve(request, engine.model)
    plan = plan_run if request.refine is None else plan_passes
    run = plan(engine, request, resolved)
    run.result.warnings[:] = [with_sources(text, sources) for text in run.result.warnings]
    if run.ranks.is_rank0 and (request.checkpoint_every is not None or resume is not None):
        run = with_checkpoints(run, resume)
    return run


def plan_passes(
    engine: Engine, request: GenerationRequest, resolved: ResolvedRequest
) -> GenerationRun:
    """Plan a run of two passes. resolved: settings of the first."""
    second = second_pass(engine, request, resolved)
    run = plan_run(engine, request, second, adapt=partial(second_workload, first=resolved))
    unwritten = replace(request, output=None, preview_every=None)
    adapt = partial(first_workload, first=resolved, second=run)
    first = plan_run(engine, unwritten, resolved, adapt=adapt)
    return join_passes(first, run)


def plan_run(
    engine: Engine,
    request: GenerationRequest,
    resolved: ResolvedRequest,
    source: EditSource | None = None,
    adapt: Callable[[Workload], Workload] | None = None,
) -> GenerationRun:
    """Plan the run of a resolved request.

    source: the video that it edits, if any. adapt: completes the workload.
    """
    guided, source_text = resolved.guidance != 1, [] if source is None else [source.text]
    size, windows = engine.ranks.size, resolved.window_count
    parallel = choose_parallel(request.parallel, size, guided=guided, windows=windows)
    if source is not None:
        parallel = source.parallel_plan(parallel, request.parallel)
    info = schedule_info(engine, resolved, parallel)
    accelerations = Accelerations(resolved.techniques, info, windows)
    output = resolve_output(request, resolved, check=engine.ranks.is_rank0)
    texts = dict.fromkeys([*resolved.all_texts, *source_text])
    encodings = {text: engine.tokenizer.encode(text) for text in texts}
    lengths = {text: len(encoding.ids) for text, encoding in encodings.items()}
    workload = Workload(
        geometry=resolved.geometry,
        text_tokens=max(resolved.most_tokens(lengths), *lengths.values()),
        evaluations=resolved.steps_to_make * SAMPLERS[resolved.sampler].evaluations,
        variants=step_variants(accelerations, resolved),
        cached_residuals=accelerations.cached_residuals,
        guided=guided,
        sequential_guidance=request.sequential_guidance,
        cfg_parallel=parallel.cfg_degree > 1,
        media=media_workload(resolved.media, resolved.geometry.size),
        clips=len(resolved.texts),
        shared_frames=request.condition_frames,
        window_texts=len(set(resolved.texts)) if resolved.windows else 0,
        vae_tiles=resolved.vae_tiles,
        vae_itemsize=engine.precision.vae.size,
        suffix="" if output is None else output.suffix.lower(),
        scale=request.scale,
    )
    if adapt is not None:
        workload = adapt(workload)
    plan, notes = plan_memory(engine, request, resolved.memory_budget, workload)
    notes += (f"{resolved.windows}.",) if windows > 1 else ()
    if request.text_cache and engine.text_cache().has_all(encodings.values()):
        plan = plan.with_cached_text()
    return GenerationRun(
        engine=engine,
        request=replace(request, dtype=engine.dtype),  # which the pipeline may have chosen
        settings=resolved,
        output=output,
        encodings=encodings,
        accelerations=accelerations,
        workload=workload,
        plan=plan,
        parallel=parallel,
        notes=notes,
        previews=Previews.from_request(request, engine, resolved, output),
        result=_first_record(engine, resolved, accelerations, *source_text),
    )


def _first_record(
    engine: Engine,
    resolved: ResolvedRequest,
    accelerations: Accelerations,
    source: str | None = None,
) -> RunResult:
    """Return the record of a run that has yet to begin. source: source prompt of an edit."""
    tokenizer = engine.tokenizer
    warnings = [
        *resolved.warnings,
        *ineffective_texts(resolved.subjects, tokenizer),
        *untrained_warning(engine.model, resolved, tokenizer, source),
        *accelerations.warnings,
    ]
    return RunResult(warnings, metadata=dict(engine.quantization))


def plan_memory(
    engine: Engine, request: GenerationRequest, budget: int | None, workload: Workload
) -> tuple[Plan, tuple[str, ...]]:
    """Return the plan of a workload, and notes. budget: bytes of the process, or None.

    Raises MemoryBudgetError; that of a measured budget names `off`.
    """
    sizes = engine.sizes(encoders=workload.media is not None)
    measured = is_automatic(request.memory_budget, request.device_profile)
    try:
        plan = make_plan(sizes, workload, engine.machine, budget, streamed=request.ci_dl)
    except LargeArrayError:
        raise  # no budget changes that
    except MemoryBudgetError as error:
        if request.device_profile is not None:  # which excludes a budget
            fix = error.fix.replace("Use --memory-budget", "Instead of it use --memory-budget", 1)
            message = f"{error.message.rstrip('.')} (--device-profile {request.device_profile})."
            raise MemoryBudgetError(message, fix) from None
        if not measured:
            raise
        fix = f"{error.fix} --memory-budget off tries it all the same, slowly if it pages."
        raise MemoryBudgetError(error.message, fix) from None
    if budget is None or not measured:
        return plan, ()
    return plan, (f"Memory budget {format_bytes(budget)}, measured; --memory-budget changes it.",)


def schedule_info(
    engine: Engine, resolved: ResolvedRequest, parallel: ParallelPlan
) -> ScheduleInfo:
    """Describe the run to its accelerations."""
    geometry, second = resolved.geometry, resolved.second_pass
    # Ranks may round differently, so rank 0 decides for all.
    agree = engine.ranks.broadcast_object if parallel.ranks > 1 else bool
    times = engine.flow_times(resolved.sampler, resolved.steps, resolved.model_args)
    if second is not None:
        times = (*times[: second.first_step], second.start, *times[second.first_step + 1 :])
    return ScheduleInfo(
        steps=resolved.steps,
        evaluations=SAMPLERS[resolved.sampler].evaluations,
        frames=geometry.latent[0],
        guided=resolved.guidance != 1,
        times=times,
        model=engine.model.path,
        model_name=engine.model.name,
        size=(*geometry.size, geometry.num_frames),
        blocks=engine.transformer_config.depth,
        first_step=resolved.first_step,
        agree=agree,
        agree_on_pass=agree if parallel.window_degree == 1 else bool,
    )


def step_variants(
    accelerations: Accelerations, resolved: ResolvedRequest
) -> tuple[tuple[StepVariant, int], ...]:
    """Count the evaluations that leave something out, by kind, as far as known before the run."""
    counts = Counter(
        StepVariant(
            merged=accelerations.merged_sites(step),
            cond_only=step in accelerations.cond_only_steps,
            blocks_skipped=step in accelerations.skipped_steps,
        )
        for step in range(resolved.first_step, resolved.steps)
    )
    del counts[StepVariant()]
    per_step = SAMPLERS[resolved.sampler].evaluations
    return tuple((variant, count * per_step) for variant, count in counts.items())


def resolve_output(
    request: GenerationRequest, resolved: ResolvedRequest, *, check: bool
) -> Path | None:
    """Fill in the template of the output; None if the frames are to stay in memory.

    With `check`, raises UsageError if the video cannot be written there.
    """
    written = resolved.geometry.decoded.enlarged(request.scale)
    if request.scale > 1 and (max(written) > MAX_SIDE or math.prod(written) > MAX_PIXELS):
        raise UsageError(
            f"--scale {request.scale} makes {written} pixels, which are too many for a video.",
            f"Lower it: {MAX_PIXELS / 1e6:g} million are the most.",
        )
    if request.output is None:
        return None
    frames = resolved.clips.total
    output = output_path(
        request.output,
        prompt=request.prompt,
        seed=resolved.seed,
        num_frames=frames,
        model=resolved.model,
    )
    if check:
        others = [checkpoint_path(output)] if request.checkpoint_every is not None else []
        if request.preview_every is not None:
            others.append(preview_path(output, resolved.geometry.num_frames))
        check_output(
            output,
            request.overwrite,
            sidecar=request.metadata,
            others=others,
            num_frames=frames,
            size=written,
            fps=resolved.fps,
        )
        if request.preview_every is not None and not request.keep_previews:
            refuse_other_file(others[-1])
        inputs = [file.path for file in resolved.media.files]
        check_inputs(output, inputs, sidecar=request.metadata)
    return output


def generate(run: GenerationRun) -> Generator[Event, None, Video]:
    """Make the video of a run; yield its events."""
    texts: dict[str, mx.array] = {}
    yield from run.opening_events()
    yield planned_run(run)
    if run.has_steps_left:
        yield from encode_text([run], texts, run.ranks)
    return (yield from generate_clips(run, texts))


def planned_run(run: GenerationRun) -> RunPlanned:
    """Return the event with all stages of a run that is made alone."""
    encode = [planned_encoding([run])] if run.has_steps_left else []
    return RunPlanned((*encode, *planned_stages(run)))


def generate_clips(run: GenerationRun, texts: TextStates) -> Generator[Event, None, Video]:
    """Make all clips of a run whose text is encoded; write each as soon as it is denoised."""
    conditioning = list[ConditioningLatents]()
    for each in run.passes if run.has_steps_left else ():
        conditioning.append((yield from encode_media(each)))
    with ExitStack() as opened:
        for each in run.passes:
            if each.previews is not None:
                opened.callback(each.previews.remove)
        writer: FrameWriter | None = None
        for clip in range(run.settings.clips.count):
            latents = yield from clip_latents(run, clip, texts, conditioning)
            # Opened after the first denoising, which may take hours and leave nothing.
            writer = writer or opened.enter_context(open_run_writer(run))
            yield from decode(run, clip, latents, writer)
            del latents
    assert writer is not None, "there is a first clip"
    return finished_video(run, writer)


def clip_latents(
    run: GenerationRun, clip: int, texts: TextStates, passes: Sequence[ConditioningLatents]
) -> Generator[Event, None, mx.array]:
    """Denoise a clip in all passes up to that of `run`, but for what a checkpoint holds.

    passes: given frames at the size of each; none if no steps are left.
    """
    latents, start = run.finished_latents(clip), None
    if passes:
        if run.first_pass is not None:
            small = yield from clip_latents(run.first_pass, clip, texts, passes[:-1])
            # Rank 0 knows what its checkpoint holds.
            if latents is None and not run.ranks.broadcast_object(run.steps_done(clip)):
                start = yield from enlarge(run, small)
        if latents is None and start is not None and not run.settings.steps_to_make:
            latents = yield from end_without_steps(run, clip, passes[-1], start)
        if latents is None:
            latents = yield from denoise(run, clip, texts, passes[-1], start)
        passes[-1].remember(clip, latents)
    assert latents is not None, "without steps left all clips are finished"
    return latents


@contextmanager
def open_run_writer(run: GenerationRun) -> Iterator[FrameWriter]:
    """Open the writer of a run. If the block ends, add the metadata and close it, on all ranks.

    Writes the sidecar, if the request asks for one, and removes the checkpoint.
    """
    with ExitStack() as opened:
        writer = _frame_writer(run)
        opened.enter_context(writer)
        yield writer
        if run.request.embed_metadata:
            writer.metadata = run.metadata()
        with run.ranks.collective_errors():
            writer.finish()
            with deferred_signals():  # all of the end, or nothing of it
                opened.close()
                if writer.path is not None and run.request.metadata:
                    write_sidecar(writer.path, run.metadata(), run.request.overwrite)
                run.checkpoints.remove()


def finished_video(run: GenerationRun, writer: FrameWriter) -> Video:
    """Return the video of a closed writer."""
    return run.video(writer.path, writer.frames if isinstance(writer, FramesInMemory) else None)


def _frame_writer(run: GenerationRun) -> FrameWriter:
    if not run.ranks.is_rank0:
        return FrameCounter()
    if run.output is None:
        return FramesInMemory(run.request.scale)
    size, fps, request = run.settings.geometry.decoded, run.settings.fps, run.request
    return open_writer(
        run.output, *size, fps, overwrite=request.overwrite, check=False, scale=request.scale
    )
