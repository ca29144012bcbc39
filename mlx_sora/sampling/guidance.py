"""Classifier-free guidance (CFG): v = uncond + scale · (cond - uncond)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx

from mlx_sora.models.text_segments import SegmentedText, Text
from mlx_sora.sampling.base import Step
from mlx_sora.sampling.rflow import add_noise

#: Predictions with and without prompt, (cond, uncond), [B, T, H, W, C] each.
CFGPredictions = tuple[mx.array, mx.array]

#: Latents [B, T, H, W, C] and x_mask of one prediction.
_Input = tuple[mx.array, mx.array | None]


@dataclass(frozen=True)
class CFGSlice:
    """Samples of an evaluation that one call computes: those from `start` on, of `total`.

    Cond samples come first, then uncond samples where they are computed.
    """

    start: int
    total: int


class TextConditionedModel(Protocol):
    """Network that predicts the velocity of latents under text."""

    def prepare(self, text: Sequence[Text]) -> Any:
        """Return what all steps share for samples with these texts."""

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


@dataclass(frozen=True)
class NoisedFrames:
    """Noise for the frames that a step does not move, so that a prediction sees them at its time.

    noise: standard normal [B, T, H, W, C]. cond: both predictions see them so, as in RePaint (arXiv
    2201.09865); False: only uncond does, the joint guidance of STIV (arXiv 2412.07730).
    """

    noise: mx.array
    cond: bool

    def select(self, frames: slice) -> NoisedFrames:
        """Return those of some of the frames."""
        return replace(self, noise=self.noise[:, frames])

    def add(self, z: mx.array, t: mx.array, x_mask: mx.array) -> mx.array:
        """Return z [B, T, H, W, C] with the frames outside of x_mask [B, T] noised to t [B]."""
        return mx.where(x_mask[:, :, None, None, None], z, add_noise(z, self.noise, t))


@dataclass
class Guidance:
    """Guided velocity of samples with `text`, one array [n, C_text] each, or the same segments.

    null_text(n) replaces a text of n tokens in the uncond samples. Both predictions are computed
    in one call, [cond, uncond], as in Open-Sora 1.2; `sequential` computes them in two calls with
    half the memory. At scale 1 uncond has no weight and is never computed. policy: replaces uncond
    in steps of its choice. noised: how frames that do not move are shown; None shows them as they
    are, at t = 0. prepared: filled at first use; others with the same text can share it.
    """

    model: TextConditionedModel
    text: Sequence[Text]
    null_text: Callable[[int], mx.array]
    scale: float
    sequential: bool = False
    policy: GuidancePolicy | None = None
    noised: NoisedFrames | None = None
    prepared: dict[str, Any] = field(default_factory=dict, repr=False)

    def __call__(self, z: mx.array, t: mx.array, step: Step, /) -> mx.array:
        """Return the velocity [B, T, H, W, C] at z and flow times t [B], inside `step`."""
        count, channels = len(self.text), z.shape[-1]
        (cond_z, cond_mask), (uncond_z, uncond_mask) = self._inputs(z, t, step)
        policy = None if self.scale == 1.0 else self.policy
        predict_uncond = None if policy is None else policy.predict_uncond(step)
        if self.scale == 1.0 or predict_uncond is not None:
            alone = CFGSlice(0, count)
            cond = self.model(cond_z, t, self._conditions("cond"), cond_mask, step.index, alone)
            cond = cond[..., :channels]
            if predict_uncond is None:
                return cond
            uncond = predict_uncond(cond)
            return uncond + self.scale * (cond - uncond)
        if self.sequential:
            first, second = CFGSlice(0, 2 * count), CFGSlice(count, 2 * count)
            cond = self.model(cond_z, t, self._conditions("cond"), cond_mask, step.index, first)
            cond = cond[..., :channels]
            # Evaluated before uncond is built, or both would be in memory together.
            mx.eval(cond)
            conditions = self._conditions("uncond")
            uncond = self.model(uncond_z, t, conditions, uncond_mask, step.index, second)
            uncond = uncond[..., :channels]
        else:
            z, t = mx.concatenate([cond_z, uncond_z]), mx.tile(t, 2)
            x_mask = _concatenate_masks(cond_mask, uncond_mask)
            both = CFGSlice(0, 2 * count)
            v = self.model(z, t, self._conditions("both"), x_mask, step.index, both)
            cond, uncond = v[:count, ..., :channels], v[count:, ..., :channels]
        if policy is not None:
            policy.update(step, (cond, uncond))
        return uncond + self.scale * (cond - uncond)

    def _inputs(self, z: mx.array, t: mx.array, step: Step) -> tuple[_Input, _Input]:
        """Return the latents and frame masks of cond and uncond."""
        clean = z, step.x_mask
        if self.noised is None or step.x_mask is None:
            return clean, clean
        noised = self.noised.add(z, t, step.x_mask), None
        return (noised if self.noised.cond else clean), noised

    def _conditions(self, samples: str) -> Any:
        """Return what the model prepared for the samples "cond", "uncond" or "both"."""
        if samples not in self.prepared:
            cond = [] if samples == "uncond" else list(self.text)
            uncond = [] if samples == "cond" else [self._null(text) for text in self.text]
            self.prepared[samples] = self.model.prepare(cond + uncond)
        return self.prepared[samples]

    def _null(self, text: Text) -> Text:
        if isinstance(text, SegmentedText):
            return text.with_null(self.null_text)
        return self.null_text(len(text))


def _concatenate_masks(first: mx.array | None, second: mx.array | None) -> mx.array | None:
    """Return two masks [B, T] as one [2 B, T]; None moves all frames."""
    found = first if first is not None else second
    if found is None:
        return None
    moves_all = mx.ones_like(found)
    return mx.concatenate([moves_all if mask is None else mask for mask in (first, second)])
