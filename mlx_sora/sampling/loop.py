"""The denoising loop: from noise (or a partly given clip) to latents, step by step.

Mirrors RFLOW.sample of Open-Sora 1.2, with an exchangeable sampler and leap policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.sampling.base import NOISE_TIME, LeapPolicy, Sampler, State, Step, Velocity
from mlx_sora.sampling.rflow import add_noise


@dataclass(frozen=True)
class Conditioning:
    """Frames of the first latents that are given.

    mask [B or 1, T] in [0, 1]: 1 generates the frame from its noise, 0 keeps the frame unchanged.
    Between them, the frame is kept until t has fallen to 1000 · mask; then it receives noise of
    that level, once, and is denoised.
    noise: returns standard normal [B, T, H, W, C] for a step index; called only where needed.
    """

    mask: mx.array
    noise: Callable[[int], mx.array]


@dataclass(frozen=True)
class RestoredSteps:
    """Progress of an interrupted run: number of steps, and `StepResult.state` after the last."""

    steps: int
    state: State


@dataclass(frozen=True)
class StepResult:
    """Result of one step. Arrays are evaluated, latents are [B, T, H, W, C].

    z_in, v: latents and velocity at step.t (of a leap, that along which it went).
    z: latents at step.t_next.
    is_leap: the step was a leap to t = 0, and the last one. seconds: wall time.
    state: returns the state of sampler and policy; valid until the next step starts.
    """

    step: Step
    z_in: mx.array
    v: mx.array
    z: mx.array
    is_leap: bool
    seconds: float
    state: Callable[[], State]

    @property
    def t(self) -> float:
        """Flow time before the step, of the first sample."""
        return float(self.step.t[0].item())  # type: ignore[arg-type]

    @property
    def x0(self) -> mx.array:
        """Latents at t = 0 if v stayed constant: an estimate of the result."""
        end = _leap(self.z_in, self.v, self.step)
        return _select(self.step, end, self.z)


def denoise(
    velocity: Velocity,
    z: mx.array,
    times: mx.array,
    sampler: Sampler,
    *,
    policy: LeapPolicy | None = None,
    conditioning: Conditioning | None = None,
    restored: RestoredSteps | None = None,
) -> Iterator[StepResult]:
    """Follow the flow from z [B, T, H, W, C] along `times` [N + 1, B or 1]; yield every step.

    times: from Sampler.timesteps, or a monotonous part of it (rising times invert the flow).
    policy: ends the run early; None takes every step.
    restored: progress of an interrupted run, z being its latents; the result is the same.
    The z of the last result is the outcome. Each step is computed when its result is requested.
    """
    times = mx.broadcast_to(times, (times.shape[0], z.shape[0]))
    mask = None if conditioning is None else mx.broadcast_to(conditioning.mask, z.shape[:2])
    history: State = {}
    if restored is not None:
        history |= restored.state["sampler"]
        if policy is not None:
            policy.restore(restored.state["policy"])

    def state() -> State:
        return {"sampler": dict(history), "policy": policy.state() if policy else {}}

    for step in _steps(times, mask):
        if restored is not None and step.index < restored.steps:
            continue
        start = time.perf_counter()
        fixed = z
        if conditioning is not None and step.fresh is not None:
            noised = add_noise(z, conditioning.noise(step.index), step.t)
            z = mx.where(_per_frame(step.fresh), noised, z)

        def velocity_fn(
            z: mx.array, t: mx.array, step: Step = step, fixed: mx.array = fixed
        ) -> mx.array:
            return velocity(_select(step, z, fixed), t, step)

        z_in, v = z, velocity(z, step.t, step)
        is_leap = policy is not None and policy.should_leap(step, z_in, v)
        if policy is not None and is_leap:
            v = policy.leap_velocity(step, v)
            z = _leap(z, v, step)
        else:
            z = sampler.step(velocity_fn, z, v, step, history)
        z = _select(step, z, fixed)
        mx.eval(z, v, z_in)
        yield StepResult(step, z_in, v, z, is_leap, time.perf_counter() - start, state)
        if is_leap:
            return


def _steps(times: mx.array, mask: mx.array | None) -> Iterator[Step]:
    """Yield the steps of a run. times [N + 1, B], mask [B, T] as in Conditioning."""
    total = int(times.shape[0]) - 1
    if mask is None:
        for index in range(total):
            yield Step(index, total, times[index], times[index + 1])
        return
    levels = mask * NOISE_TIME
    moved, moves_last = mask == 1, levels >= times[-2][:, None]
    for index in range(total):
        t = times[index]
        moves = levels >= t[:, None]
        fresh, pending = _or_none(moves & ~moved), _or_none(moves_last & ~moves)
        yield Step(index, total, t, times[index + 1], moves, fresh, pending)
        moved = moves


def _or_none(mask: mx.array) -> mx.array | None:
    return mask if mask.any().item() else None


def _leap(z: mx.array, v: mx.array, step: Step) -> mx.array:
    """Return z at t = 0, on a straight line along v."""
    return z + v * (step.t / NOISE_TIME).reshape(-1, 1, 1, 1, 1)


def _select(step: Step, moved: mx.array, fixed: mx.array) -> mx.array:
    """Return `moved` for the frames that this step moves, and `fixed` for the others."""
    return moved if step.x_mask is None else mx.where(_per_frame(step.x_mask), moved, fixed)


def _per_frame(mask: mx.array) -> mx.array:
    """Reshape [B, T] to [B, T, 1, 1, 1]."""
    return mask[:, :, None, None, None]
