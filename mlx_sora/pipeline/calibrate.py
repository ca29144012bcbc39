"""Calibration: search step cache schedules on a model's own weights.

On the exact path of a few prompts, every segment of steps that could reuse the residual of its
first step is tried: how far do its velocities, computed with that residual, lead away from the
path? The best schedule of n computed steps is then the shortest path through n segments. Blocks
run in the exact steps only, so a prompt takes little longer than its video; the residuals of all
steps stay in memory meanwhile. The search is that of GCache and LeMiCa; measuring the errors on
the path itself is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx

from mlx_sora import __version__
from mlx_sora.accel import Accelerations
from mlx_sora.accel.schedules import ScheduleTable
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.generate import prepare, schedule_info
from mlx_sora.pipeline.locks import model_lock
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.pipeline.stages import clip_guidance, clip_transformer, encode_text
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.sampling import SAMPLERS
from mlx_sora.sampling.base import Step, Velocity
from mlx_sora.sampling.guidance import CFGSlice, Guidance
from mlx_sora.sampling.loop import StepResult, denoise
from mlx_sora.sampling.noise import Noise

AnyProbe = TypeVar("AnyProbe", bound=Accelerations)

#: Default of the most steps that a segment may span.
REACH = 20

#: Error of a segment (the computed step before it, its first step, the step after it). The step
#: before matters to a linear forecast only; it is the first step itself if there is none.
Errors = dict[tuple[int, int, int], float]


@dataclass(frozen=True)
class ExactStep:
    """One step of an exact path: its place, latents, velocity, and the blocks' residual."""

    step: Step
    z: mx.array
    v: mx.array
    residual: mx.array


class Probe(Accelerations):
    """Block stack cache that records the residual, or returns `forced` in its place."""

    forced: mx.array | None = None
    recorded: mx.array

    def block_cache(self, step: int, part: CFGSlice) -> Probe:
        return self

    def cached_residual(self, x: mx.array, t: mx.array, x_mask: mx.array | None) -> mx.array | None:
        return self.forced

    def update(self, x: mx.array, out: mx.array) -> None:
        self.recorded = out - x
        mx.eval(self.recorded)


def calibrate(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    reach: int = REACH,
    on_progress: Callable[[int], None] = lambda done: None,
) -> ScheduleTable:
    """Return the schedules for the size and steps of `requests`, which differ in prompt and seed.

    reach: the longest segment. on_progress: called with the number of finished prompts.
    """
    assert requests, "there is a request"
    errors: dict[int, list[Errors]] = {0: [], 1: []}
    with model_lock(engine.model.path):
        for done, request in enumerate(requests, start=1):
            run = prepare(engine, request.with_seed())
            for order, found in _measure(run, reach).items():
                errors[order].append(found)
            on_progress(done)
    settings = run.settings
    steps, (width, height) = settings.steps, settings.geometry.size
    best = {
        str(order): dict(schedules(_mean(each), steps, order)) for order, each in errors.items()
    }
    return ScheduleTable(
        steps=steps,
        width=width,
        height=height,
        num_frames=settings.geometry.num_frames,
        orders={o: {str(n): path for n, (path, _) in own.items()} for o, own in best.items()},
        errors={o: {str(n): round(e, 6) for n, (_, e) in own.items()} for o, own in best.items()},
        about={
            "model": settings.model,
            "guidance": settings.guidance,
            "prompts": len(requests),
            "reach": reach,
            "mlx_sora": __version__,
        },
    )


def schedules(
    errors: Errors, steps: int, order: int
) -> Iterator[tuple[int, tuple[list[int], float]]]:
    """Yield, for every number of computed steps, the best schedule and its sum of errors.

    Every schedule begins with step 0. Dynamic programming over the last two computed steps.
    """
    # (step computed before, step computed last) -> least error so far, and its schedule.
    paths: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [0])}
    for count in range(1, steps):
        ends = [
            (error + errors[before, now, steps], path)
            for (before, now), (error, path) in paths.items()
            if (before, now, steps) in errors
        ]
        if ends:
            best, path = min(ends)
            yield count, (path, best)
        longer: dict[tuple[int, int], tuple[float, list[int]]] = {}
        for (before, now), (error, path) in paths.items():
            for then in range(now + 1, steps):
                segment = errors.get((before, now, then))
                state = (now, then) if order else (then, then)
                if segment is not None and error + segment < longer.get(state, (math.inf,))[0]:
                    longer[state] = (error + segment, [*path, then])
        paths = longer


def _mean(errors: Sequence[Errors]) -> Errors:
    return {key: sum(each[key] for each in errors) / len(errors) for key in errors[0]}


def _measure(run: GenerationRun, reach: int) -> dict[int, Errors]:
    """Measure the errors of all segments on one prompt, for both orders of forecast."""
    with probed_transformer(run, Probe) as (velocity, channels, probe):
        path = [
            ExactStep(step.step, step.z_in, step.v, probe.recorded)
            for step in exact_path(run, velocity, channels)
        ]
        return {
            order: dict(_segment_errors(path, velocity, probe, reach, order)) for order in (0, 1)
        }


@contextmanager
def probed_transformer(
    run: GenerationRun, make_probe: type[AnyProbe]
) -> Iterator[tuple[Guidance, int, AnyProbe]]:
    """Encode the text of a run and open its transformer under a probe.

    Yields the guided velocity, the channels of latents, and the probe.
    """
    texts: dict[str, mx.array] = {}
    for _ in encode_text([run], texts, run.ranks):
        pass
    plan = run.plan.stage("denoise")
    with run.loader.stage(plan), run.loader.transformer(plan) as transformer:
        probe = make_probe({}, schedule_info(run.engine, run.settings, run.parallel))
        velocity = clip_guidance(run, clip_transformer(run, transformer, probe), texts)
        yield velocity, transformer[0].config.in_channels, probe


def exact_path(run: GenerationRun, velocity: Velocity, channels: int) -> Iterator[StepResult]:
    """Yield the Euler steps of a run without any technique."""
    settings, sampler = run.settings, SAMPLERS["rflow"]
    times = sampler.timesteps(settings.steps, **settings.model_args.sizes)
    noise = Noise([settings.seed], (*settings.geometry.latent, channels))
    yield from denoise(velocity, noise.initial(), times, sampler)


def _segment_errors(
    path: Sequence[ExactStep], velocity: Guidance, probe: Probe, reach: int, order: int
) -> Iterator[tuple[tuple[int, int, int], float]]:
    """Yield the error of every segment, as a share of the whole path's length."""
    length = _rms(sum((each.v * each.step.dt for each in path), mx.zeros(1)))
    for now in range(len(path)):
        earlier = range(max(0, now - reach), now) if order and now else (now,)
        for before in earlier:
            error = mx.zeros_like(path[0].z)
            yield (before, now, now + 1), 0.0
            for then in range(now + 1, min(now + reach, len(path))):
                exact = path[then]
                probe.forced = _extrapolate(path[before], path[now], exact.step)
                v = velocity(exact.z, exact.step.t, exact.step)
                error = error + (v - exact.v) * exact.step.dt
                yield (before, now, then + 1), _rms(error) / length
    probe.forced = None


def _extrapolate(before: ExactStep, now: ExactStep, step: Step) -> mx.array:
    """Return the residual in `step` as a cache that computed `before` and `now` predicts it."""
    if before is now:
        return now.residual
    share = (step.t - now.step.t) / (now.step.t - before.step.t)
    return now.residual + (now.residual - before.residual) * share.reshape(-1, 1, 1, 1)


def _rms(x: mx.array) -> float:
    return float(mx.sqrt((x * x).mean()).item())  # type: ignore[arg-type]


def requests_for(prompts: Iterable[str], options: Mapping[str, Any]) -> list[GenerationRequest]:
    """Return a request per prompt, with seeds 0, 1, 2, ..."""
    return [
        GenerationRequest.from_dict({**options, "prompt": prompt, "seed": seed})
        for seed, prompt in enumerate(prompts)
    ]
