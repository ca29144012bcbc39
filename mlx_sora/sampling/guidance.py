"""Classifier-free guidance (CFG): v = uncond + scale · (cond - uncond)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from mlx_sora.sampling.base import Step

#: Predictions with and without prompt, (cond, uncond), [B, T, H, W, C] each.
CFGPredictions = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class CFGSlice:
    """Samples of an evaluation that one call computes: those from `start` on, of `total`.

    Cond samples come first, then uncond samples where they are computed.
    """

    start: int
    total: int


class TextConditionedModel(Protocol):
    """Network that predicts the velocity of latents under text."""

    def prepare(self, text: Sequence[mx.array]) -> Any:
        """Return what all steps share for samples with these texts, one [n, C_text] each."""

    def __call__(
        self,
        z: mx.array,
        t: mx.array,
        conditions: Any,
        x_mask: mx.array | None,
        step: int,
        cfg_slice: CFGSlice,
        /,
    ) -> mx.array:
        """Predict [b, T, H, W, C or more] at z [b, T, H, W, C] and times t [b] in step `step`.

        conditions: from `prepare`. x_mask [b, T] or None. Channels beyond those of z are ignored.
        """


class GuidancePolicy(Protocol):
    """Decides in which steps the uncond prediction is not computed, and what replaces it."""

    def predict_uncond(self, step: Step, /) -> Callable[[mx.array], mx.array] | None:
        """Return a function from cond to uncond [B, T, H, W, C]; None to compute both."""

    def update(self, step: Step, predictions: CFGPredictions, /) -> None:
        """Receive the predictions of a step that computed both; they may still be lazy."""


@dataclass
class Guidance:
    """Guided velocity of samples with `text`, one array [n, C_text] each.

    null_text(n) replaces a prompt of n tokens in the uncond samples. Both predictions are computed
    in one call, [cond, uncond], as in Open-Sora 1.2; `sequential` computes them in two calls with
    half the memory. At scale 1 uncond has no weight and is never computed. policy: replaces uncond
    in steps of its choice.
    """

    model: TextConditionedModel
    text: Sequence[mx.array]
    null_text: Callable[[int], mx.array]
    scale: float
    sequential: bool = False
    policy: GuidancePolicy | None = None
    _conditions: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        """Velocity [B, T, H, W, C] at z and flow times t [B], inside `step`."""
        if self.scale == 1.0:
            return self._predict_cond(z, t, step)
        replace_uncond = None if self.policy is None else self.policy.predict_uncond(step)
        if replace_uncond is not None:
            cond = self._predict_cond(z, t, step)
            uncond = replace_uncond(cond)
        else:
            cond, uncond = self._predict_both(z, t, step)
            if self.policy is not None:
                self.policy.update(step, (cond, uncond))
        return uncond + self.scale * (cond - uncond)

    def _predict_cond(self, z: mx.array, t: mx.array, step: Step) -> mx.array:
        return self._predict("cond", z, t, step, CFGSlice(0, len(self.text)))

    def _predict_both(self, z: mx.array, t: mx.array, step: Step) -> CFGPredictions:
        count = len(self.text)
        if not self.sequential:
            z2, t2 = mx.concatenate([z, z]), mx.tile(t, 2)
            both = self._predict("both", z2, t2, step, CFGSlice(0, 2 * count))
            return both[:count], both[count:]
        cond = self._predict("cond", z, t, step, CFGSlice(0, 2 * count))
        # Evaluated before uncond is built, or both would be in memory together.
        mx.eval(cond)
        return cond, self._predict("uncond", z, t, step, CFGSlice(count, 2 * count))

    def _predict(
        self, texts: str, z: mx.array, t: mx.array, step: Step, cfg_slice: CFGSlice
    ) -> mx.array:
        if texts not in self._conditions:
            cond = [] if texts == "uncond" else list(self.text)
            uncond = [] if texts == "cond" else [self.null_text(len(text)) for text in self.text]
            self._conditions[texts] = self.model.prepare(cond + uncond)
        x_mask = step.x_mask
        if x_mask is not None:
            x_mask = mx.tile(x_mask, (len(z) // len(x_mask), 1))
        conditions = self._conditions[texts]
        v = self.model(z, t, conditions, x_mask, step.index, cfg_slice)
        return v[..., : z.shape[-1]]
