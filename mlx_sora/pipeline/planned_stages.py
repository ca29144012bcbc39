"""Stages that a run will have, for progress: in their order, with their work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_sora.conditioning.latents import encode_tasks
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.runtime.events import PlannedStage


def planned_encoding(runs: Sequence[GenerationRun]) -> PlannedStage:
    """Return the stage of `stages.encode_text`."""
    texts = {text for run in runs for text in run.encodings}
    work = max(run.plan.stage("encode").flops for run in runs) * len(texts)
    return PlannedStage("encode", len(texts), work)


def planned_stages(run: GenerationRun, request: int = 0) -> Iterator[PlannedStage]:
    """Yield the stages after the text's, those of finished clips included.

    request: index among several requests.
    """
    clips, first = run.settings.clips, run.first_pass
    for each in run.passes if run.has_steps_left else ():
        if tasks := len(encode_tasks(each.settings.media, each.settings.geometry.size)):
            yield PlannedStage("read", tasks, _chunk_work(each) * tasks, request=request)
    for clip in range(clips.count):
        place = {"clip": clip, "clips": clips.count, "request": request}
        if first is not None:
            yield _denoising(first, clip, place | {"passes": 2})
            begun = run.finished_latents(clip) is not None or run.steps_done(clip)
            yield from () if begun else _enlarging(run, first, place)
            place |= {"pass_index": 1, "passes": 2}
        if run.settings.steps_to_make:
            yield _denoising(run, clip, place)
        frames = clips.num_frames - clips.frames_to_skip(clip)
        work = run.plan.stage("decode").flops * frames / clips.total
        yield PlannedStage("decode", frames, work, **place)


def _denoising(run: GenerationRun, clip: int, place: dict[str, int]) -> PlannedStage:
    settings = run.settings
    steps = settings.steps_to_make * (1 + run.workload.inversion)
    work = run.plan.stage("denoise").flops / settings.clips.count
    done = steps if run.finished_latents(clip) is not None else run.steps_done(clip)
    return PlannedStage("denoise", steps, work, done, **place)


def _enlarging(
    run: GenerationRun, first: GenerationRun, place: dict[str, int]
) -> Iterator[PlannedStage]:
    work = first.plan.stage("decode").flops / first.workload.num_frames
    for part in first.parts:
        frames = sum(chunk.frames for chunk in part)
        yield PlannedStage("decode", frames, work * frames, **place, passes=2)
        yield PlannedStage("read", len(part), _chunk_work(run) * len(part), **place, passes=2)


def _chunk_work(run: GenerationRun) -> float:
    """Return the operations of encoding a chunk."""
    assert run.workload.media is not None
    return run.plan.stage("read").flops / run.workload.media.chunks
