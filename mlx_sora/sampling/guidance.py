"""Classifier-free guidance: velocity = without + scale · (with - without) prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import mlx.core as mx

from mlx_sora.sampling.base import Step, Velocity


class Network(Protocol):
    """A network bound to the text of its samples."""

    def __call__(
        self, z: mx.array, t: mx.array, x_mask: mx.array | None, index: int, /
    ) -> mx.array:
        """Prediction [b, T, H, W, C or more] at z [b, ...] and times t [b] in step `index`.

        x_mask [b, T] or None. Only the first C channels, those of z, are the velocity.
        """


@dataclass(frozen=True)
class CFGSlice:
    """Which samples of an evaluation a call is about: those from `first` on, of `total`.

    Samples with prompt come first, then those without where they are run.
    """

    start: int
    total: int


#: Binds a network to one text [n, C_text] per sample, for calls about that part of evaluations.
Bind = Callable[[Sequence[mx.array], CFGSlice], Network]

#: Predictions with prompt and without, [B, T, H, W, C] each.
CFGPredictions = tuple[mx.array, mx.array]


class GuidancePolicy(Protocol):
    """Says in which steps the half without prompt is not run, and what stands for it."""

    def predict_uncond(self, step: Step, /) -> Callable[[mx.array], mx.array] | None:
        """Makes that half of the half with prompt [B, T, H, W, C]; None has both run."""

    def update(self, step: Step, halves: CFGPredictions, /) -> None:
        """Both halves have been run in `step`; they may still be lazy."""


def guided(
    bind: Bind,
    text: Sequence[mx.array],
    null_text: Callable[[int], mx.array],
    scale: float,
    *,
    sequential: bool = False,
    policy: GuidancePolicy | None = None,
) -> Velocity:
    """Guided velocity of samples with `text`, one array [n, C_text] each.

    null_text(n) is what stands for no prompt beside a prompt of n tokens. Both halves run in one
    call, [with, without], as in Open-Sora 1.2; sequential: in two, with half the memory. At scale
    1 the half without prompt has no weight and is not run at all. policy: spares that half in
    steps of its choice.
    """
    count = len(text)
    if scale == 1.0:
        return _Plain(bind(text, CFGSlice(0, count)))
    null = [null_text(len(sample)) for sample in text]
    whole, rest = CFGSlice(0, 2 * count), CFGSlice(count, 2 * count)
    run = (
        _Sequential(bind(text, whole), bind(null, rest))
        if sequential
        else _Batched(bind([*text, *null], whole))
    )
    if policy is None:
        return _Guided(run, scale)
    return _Spared(run, scale, policy, lambda: _Plain(bind(text, CFGSlice(0, count))))


class _Plain:
    def __init__(self, network: Network) -> None:
        self._network = network

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        return _velocity(self._network, z, t, step.x_mask, step.index)


class _Batched:
    """Both halves in one call."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> CFGPredictions:
        x_mask = None if step.x_mask is None else mx.tile(step.x_mask, (2, 1))
        both = _velocity(self._network, mx.concatenate([z, z]), mx.tile(t, 2), x_mask, step.index)
        return both[: len(z)], both[len(z) :]


class _Sequential:
    """One half after the other."""

    def __init__(self, network: Network, null: Network) -> None:
        self._network, self._null = network, null

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> CFGPredictions:
        with_prompt = _velocity(self._network, z, t, step.x_mask, step.index)
        # Evaluated before the other half is built, or both would be in memory together.
        mx.eval(with_prompt)
        return with_prompt, _velocity(self._null, z, t, step.x_mask, step.index)


class _Guided:
    """Both halves in every step."""

    def __init__(self, run: _Batched | _Sequential, scale: float) -> None:
        self._run, self._scale = run, scale

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        return _mix(self._run(z, t, step), self._scale)


class _Spared(_Guided):
    """Both halves, but for steps in which a policy makes one of the other."""

    def __init__(
        self,
        run: _Batched | _Sequential,
        scale: float,
        policy: GuidancePolicy,
        alone: Callable[[], Velocity],
    ) -> None:
        super().__init__(run, scale)
        self._policy = policy
        self._alone = cache(alone)

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        make = self._policy.predict_uncond(step)
        if make is None:
            halves = self._run(z, t, step)
            self._policy.update(step, halves)
        else:
            with_prompt = self._alone()(z, t, step)
            halves = with_prompt, make(with_prompt)
        return _mix(halves, self._scale)


def _velocity(
    network: Network, z: mx.array, t: mx.array, x_mask: mx.array | None, index: int
) -> mx.array:
    return network(z, t, x_mask, index)[..., : z.shape[-1]]


def _mix(halves: CFGPredictions, scale: float) -> mx.array:
    with_prompt, without = halves
    return without + scale * (with_prompt - without)
