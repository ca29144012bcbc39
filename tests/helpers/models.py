"""The transformer as the sampling loop calls it, without a run around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_sora.models.hooks import Hooks
from mlx_sora.models.stdit3 import BlockPair, Conditions, STDiT3
from mlx_sora.sampling.guidance import CFGSlice


class BoundModel:
    """Fills `TextConditionedModel`; `arguments` are those of STDiT3.prepare.

    hooks: from a step to the network's hooks. masks: the frame mask of each call.
    """

    def __init__(
        self,
        network: STDiT3,
        grid: Sequence[int],
        hooks: Callable[[int], Hooks[BlockPair] | None] = lambda step: None,
        **arguments: Any,
    ) -> None:
        self.masks: list[mx.array | None] = []
        self._network, self._grid, self._hooks, self._arguments = network, grid, hooks, arguments

    def prepare(self, text: Sequence[mx.array]) -> Conditions:
        return self._network.prepare(text, self._grid, **self._arguments)

    def __call__(
        self,
        z: mx.array,
        t: mx.array,
        conditions: Conditions,
        x_mask: mx.array | None,
        step: int,
        cfg_slice: CFGSlice,
        /,
    ) -> mx.array:
        self.masks.append(x_mask)
        return self._network(z, t, conditions, x_mask, self._hooks(step))
