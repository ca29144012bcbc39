"""Searching step cache schedules on a model's own weights.

On the exact path of a few prompts, every segment of steps that could reuse the sum of its first
one is tried: how far its velocities, taken with that sum, lead away from the path. The best
schedule of n computed steps is then the shortest way through n segments. Blocks run in the exact
steps only, so a prompt takes little more than its video does; the sums of all steps are kept
meanwhile. The search is that of GCache and LeMiCa; the errors, taken on the path itself, are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_sora import __version__
from mlx_sora.accel import Accelerations
from mlx_sora.accel.schedules import ScheduleTable
from mlx_sora.models.hooks import Hooks
from mlx_sora.models.stdit3 import STDiT3
from mlx_sora.pipeline.pipeline import Pipeline
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.pipeline.stages import Texts, bound
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.sampling import SAMPLERS
from mlx_sora.sampling.base import Step, Velocity
from mlx_sora.sampling.guidance import CFGSlice, guided
from mlx_sora.sampling.loop import denoise
from mlx_sora.sampling.noise import Noise

#: Steps that a segment may span, unless told otherwise.
REACH = 20

#: Error of a segment (the computed step before it, its first step, the step after it). The step
#: before matters to a forecast only, and is the first step itself where there is none.
Errors = dict[tuple[int, int, int], float]


@dataclass(frozen=True)
class Made:
    """One step of an exact path: its place, latents and velocity, and what the blocks added."""

    step: Step
    z: mx.array
    v: mx.array
    sums: mx.array


class Probe(Accelerations):
    """Fills the seam around the blocks: takes note of their sum, or hands out `given`."""

    given: mx.array | None = None
    seen: mx.array

    def block_cache(self, step: int, part: CFGSlice) -> Probe:
        return self

    def cached_residual(self, x: mx.array, t: mx.array, x_mask: mx.array | None) -> mx.array | None:
        return self.given

    def update(self, x: mx.array, out: mx.array) -> None:
        self.seen = out - x
        mx.eval(self.seen)


def calibrate(
    pipe: Pipeline,
    requests: Sequence[GenerationRequest],
    reach: int = REACH,
    tell: Callable[[int], None] = lambda done: None,
) -> ScheduleTable:
    """The table of schedules for the size and steps of `requests`, which differ in prompt and seed.

    reach: the longest segment. tell: called with the number of prompts that are done.
    """
    found: dict[int, list[Errors]] = {0: [], 1: []}
    run: GenerationRun | None = None
    for done, request in enumerate(requests, start=1):
        run = pipe._prepare(request.with_seed())
        for order, errors in _measured(pipe, run, reach).items():
            found[order].append(errors)
        tell(done)
    assert run is not None, "there is a request"
    settings = run.settings
    steps, (width, height) = settings.steps, settings.geometry.size
    chosen = {
        str(order): dict(schedules(_mean(each), steps, order)) for order, each in found.items()
    }
    return ScheduleTable(
        steps=steps,
        width=width,
        height=height,
        num_frames=settings.geometry.num_frames,
        orders={o: {str(n): way for n, (way, _) in own.items()} for o, own in chosen.items()},
        errors={o: {str(n): round(e, 6) for n, (_, e) in own.items()} for o, own in chosen.items()},
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
    """Of every number of computed steps, the schedule with the least sum of errors, and that sum.

    All begin with step 0.
    """
    # What it takes to have computed `before` and then `now` last, and the schedule that does.
    ways: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [0])}
    for count in range(1, steps):
        ends = [
            (sum_ + errors[before, now, steps], way)
            for (before, now), (sum_, way) in ways.items()
            if (before, now, steps) in errors
        ]
        if ends:
            best, way = min(ends)
            yield count, (way, best)
        longer: dict[tuple[int, int], tuple[float, list[int]]] = {}
        for (before, now), (sum_, way) in ways.items():
            for then in range(now + 1, steps):
                error = errors.get((before, now, then))
                state = (now, then) if order else (then, then)
                if error is not None and sum_ + error < longer.get(state, (math.inf,))[0]:
                    longer[state] = (sum_ + error, [*way, then])
        ways = longer


def _mean(found: Sequence[Errors]) -> Errors:
    return {key: sum(each[key] for each in found) / len(found) for key in found[0]}


def _measured(pipe: Pipeline, run: GenerationRun, reach: int) -> dict[int, Errors]:
    """Errors of all segments on one prompt, for both orders."""
    texts: dict[str, mx.array] = {}
    for _ in pipe._encode([run], texts):
        pass
    plan, lifetimes = run.plan.stage("denoise"), pipe._lifetimes(run)
    with lifetimes.stage(plan), lifetimes.transformer(plan) as (network, blocks):
        probe = Probe({}, pipe._job(run.settings))
        run.accelerations = probe
        velocity = _velocity(run, network, texts, Hooks(blocks))
        path = list(_exact(run, velocity, network.config.in_channels, probe))
        return {order: dict(_segments(path, velocity, probe, reach, order)) for order in (0, 1)}


def _velocity(run: GenerationRun, network: STDiT3, texts: Texts, context: Hooks[Any]) -> Velocity:
    return guided(
        partial(bound, network, run, lambda index, t: context),
        [texts[run.settings.text]],
        network.null_text,
        run.settings.guidance,
    )


def _exact(run: GenerationRun, velocity: Velocity, channels: int, probe: Probe) -> Iterator[Made]:
    settings = run.settings
    sampler = SAMPLERS["rflow"]
    times = sampler.timesteps(settings.steps, **settings.model_args.sizes)
    noise = Noise([settings.seed], (*settings.geometry.latent, channels))
    for done in denoise(velocity, noise.initial(), times, sampler):
        yield Made(done.step, done.z_in, done.v, probe.seen)


def _segments(
    path: Sequence[Made], velocity: Velocity, probe: Probe, reach: int, order: int
) -> Iterator[tuple[tuple[int, int, int], float]]:
    """Error of every segment: how far it leads off, as a share of the whole path's length."""
    length = _rms(sum((made.v * made.step.dt for made in path), mx.zeros(1)))
    for now in range(len(path)):
        earlier = range(max(0, now - reach), now) if order and now else (now,)
        for before in earlier:
            off = mx.zeros_like(path[0].z)
            yield (before, now, now + 1), 0.0
            for then in range(now + 1, min(now + reach, len(path))):
                made = path[then]
                probe.given = _forecast(path[before], path[now], made.step)
                off = off + (velocity(made.z, made.step.t, made.step) - made.v) * made.step.dt
                yield (before, now, then + 1), _rms(off) / length
    probe.given = None


def _forecast(before: Made, now: Made, step: Step) -> mx.array:
    """What a cache that has computed `before` and `now` takes the sum in `step` for."""
    if before is now:
        return now.sums
    share = (step.t - now.step.t) / (now.step.t - before.step.t)
    return now.sums + (now.sums - before.sums) * share.reshape(-1, 1, 1, 1)


def _rms(x: mx.array) -> float:
    return float(mx.sqrt((x * x).mean()).item())  # type: ignore[arg-type]


def requests_for(prompts: Iterable[str], options: Mapping[str, Any]) -> list[GenerationRequest]:
    """A request per prompt, seeds counted from 0."""
    return [
        GenerationRequest.from_dict({**options, "prompt": prompt, "seed": seed})
        for seed, prompt in enumerate(prompts)
    ]
