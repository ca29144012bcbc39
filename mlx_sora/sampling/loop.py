"""The denoising loop, the only one: from noise (or a masked clip) to latents, step by step.

Mirrors RFLOW.sample of Open-Sora 1.2, with sampler and policy as parts that can be exchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.sampling.base import (
    NOISE_TIME,
    AllSteps,
    Decision,
    Sampler,
    State,
    Step,
    Stepper,
    StepPolicy,
    Trajectory,
    Velocity,
    restore,
    state_of,
)
from mlx_sora.sampling.rflow import add_noise


@dataclass(frozen=True)
class Conditioning:
    """Which frames of the first latents are given, and how firmly.

    mask [B or 1, T] in [0, 1]: 1 generates the frame from the noise that it holds; 0 keeps it as
    it is; in between it is kept until t has fallen to 1000 · mask, then gets noise of that level,
    once, and is denoised.
    noise: step index to standard normal [B, T, H, W, C]; asked only for steps that need it.
    """

    mask: mx.array
    noise: Callable[[int], mx.array]


@dataclass(frozen=True)
class RestoredSteps:
    """Where a run stands: steps made, and `StepResult.state` after the last of them."""

    steps: int
    state: State


@dataclass(frozen=True)
class _Parts:
    """What has a memory in a run, maybe."""

    sampler: Stepper
    policy: Decision

    def state(self) -> State:
        return {"sampler": state_of(self.sampler), "policy": state_of(self.policy)}

    def restore(self, state: State) -> None:
        restore(self.sampler, state["sampler"])
        restore(self.policy, state["policy"])


@dataclass(frozen=True)
class StepResult:
    """One step made; latents [B, T, H, W, C], all evaluated.

    z_in: latents that the velocity v was taken at, time step.t. z: latents after the step, at
    step.t_next. leapt: the run ended here by going straight to t = 0. seconds: wall time.
    state: what sampler and policy know, until the next step is asked for.
    """

    step: Step
    z_in: mx.array
    v: mx.array
    z: mx.array
    leapt: bool
    seconds: float
    state: Callable[[], State]

    @property
    def t(self) -> float:
        """Flow time before the step, of the first sample."""
        return float(self.step.t[0].item())  # type: ignore[arg-type]

    @property
    def x0(self) -> mx.array:
        """The video's latents as this step foresees them: straight on along v to t = 0."""
        end = self.z_in + self.v * (self.step.t / NOISE_TIME).reshape(-1, 1, 1, 1, 1)
        return _held(self.step, end, self.z)


def denoise(
    velocity: Velocity,
    z: mx.array,
    times: mx.array,
    sampler: Sampler,
    *,
    policy: StepPolicy | None = None,
    conditioning: Conditioning | None = None,
    restored: RestoredSteps | None = None,
) -> Iterator[StepResult]:
    """Follow the flow from z [B, T, H, W, C] along `times` [N + 1, B or 1]; yields every step made.

    times: from Sampler.timesteps, or any monotonous part of it (rising times invert the flow).
    made: goes on after the steps that an interrupted run has made, from its z; as it would have.
    The last result's z is the outcome. Nothing is computed ahead of what is asked for.
    """
    times = mx.broadcast_to(times, (times.shape[0], z.shape[0]))
    mask = None if conditioning is None else mx.broadcast_to(conditioning.mask, z.shape[:2])
    run = Trajectory(times, mask)
    parts = _Parts(sampler.start(run), (policy or AllSteps()).start(run))
    if restored is not None:
        parts.restore(restored.state)
    for step in _steps(run):
        if restored is not None and step.index < restored.steps:
            continue
        began = time.perf_counter()
        still = z
        if conditioning is not None and step.fresh is not None:
            noised = add_noise(z, conditioning.noise(step.index), step.t)
            z = mx.where(_per_frame(step.fresh), noised, z)

        def field(z: mx.array, t: mx.array, step: Step = step, still: mx.array = still) -> mx.array:
            return velocity(_held(step, z, still), t, step)

        z_in, v = z, velocity(z, step.t, step)
        leapt = parts.policy.should_leap(step, z_in, v)
        if leapt:
            z = z_in + v * (step.t / NOISE_TIME).reshape(-1, 1, 1, 1, 1)
        else:
            z = parts.sampler.step(field, z_in, v, step)
        z = _held(step, z, still)
        mx.eval(z, v, z_in)
        seconds = time.perf_counter() - began
        yield StepResult(step, z_in, v, z, leapt, seconds, parts.state)
        if leapt:
            return


def _steps(run: Trajectory) -> Iterator[Step]:
    """The steps of a run, with the frames that move in each and those that begin to."""
    moved = None if run.mask is None else run.mask == 1
    for index in range(run.steps):
        t, t_next = run.times[index], run.times[index + 1]
        if run.mask is None or moved is None:
            yield Step(index, run.steps, t, t_next)
            continue
        moves = run.mask * NOISE_TIME >= t[:, None]
        fresh = moves & ~moved
        yield Step(index, run.steps, t, t_next, moves, fresh if fresh.any().item() else None)
        moved = moves


def _held(step: Step, moved: mx.array, still: mx.array) -> mx.array:
    """`moved` for the frames that move in this step, `still` for the others."""
    return moved if step.x_mask is None else mx.where(_per_frame(step.x_mask), moved, still)


def _per_frame(mask: mx.array) -> mx.array:
    """[B, T] to [B, T, 1, 1, 1]."""
    return mask[:, :, None, None, None]
