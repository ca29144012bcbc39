"""Classifier-free guidance: velocity = without + scale · (with - without) prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


#: Binds a network to one text [n, C_text] per sample.
Bind = Callable[[Sequence[mx.array]], Network]


def guided(
    bind: Bind,
    text: Sequence[mx.array],
    null_text: Callable[[int], mx.array],
    scale: float,
    *,
    sequential: bool = False,
) -> Velocity:
    """Guided velocity of samples with `text`, one array [n, C_text] each.

    null_text(n) is what stands for no prompt beside a prompt of n tokens. Both halves run in one
    call, [with, without], as in Open-Sora 1.2; sequential: in two, with half the memory. At scale
    1 the half without prompt has no weight and is not run at all.
    """
    if scale == 1.0:
        return _Plain(bind(text))
    null = [null_text(len(sample)) for sample in text]
    if sequential:
        return _Sequential(bind(text), bind(null), scale)
    return _Batched(bind([*text, *null]), scale)


class _Plain:
    def __init__(self, network: Network) -> None:
        self._network = network

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        return _velocity(self._network, z, t, step.x_mask, step.index)


class _Batched:
    def __init__(self, network: Network, scale: float) -> None:
        self._network, self._scale = network, scale

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        x_mask = None if step.x_mask is None else mx.tile(step.x_mask, (2, 1))
        both = _velocity(self._network, mx.concatenate([z, z]), mx.tile(t, 2), x_mask, step.index)
        return _mix(both[: len(z)], both[len(z) :], self._scale)


class _Sequential:
    def __init__(self, network: Network, null: Network, scale: float) -> None:
        self._network, self._null, self._scale = network, null, scale

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        with_prompt = _velocity(self._network, z, t, step.x_mask, step.index)
        # Evaluated before the other half is built, or both would be in memory together.
        mx.eval(with_prompt)
        return _mix(with_prompt, _velocity(self._null, z, t, step.x_mask, step.index), self._scale)


def _velocity(
    network: Network, z: mx.array, t: mx.array, x_mask: mx.array | None, index: int
) -> mx.array:
    return network(z, t, x_mask, index)[..., : z.shape[-1]]


def _mix(with_prompt: mx.array, without: mx.array, scale: float) -> mx.array:
    return without + scale * (with_prompt - without)
