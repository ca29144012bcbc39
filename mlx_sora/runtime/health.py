"""Numerical health of a run, checked after every stage and every step.

Only values that no prompt can produce stop a run: NaN and Inf, arrays without any variance, frames
that are bit-identical, frames beyond black or white everywhere, latents far outside the range of
flow matching. A still, a white or a noisy video passes. A check evaluates a few reductions at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.errors import NumericsError, shell_words
from mlx_sora.models.precision import Precision

#: Root mean square far beyond any flow from unit noise to latents of unit variance.
EXPLODED = 50.0

#: Above this, guidance is a likelier cause of exploding latents than the weights.
HIGH_GUIDANCE = 15.0

#: Differences up to this fraction of the largest value are rounding.
FLAT = 1e-6

_ANYWAY = "--no-health-check continues anyway"


@dataclass(frozen=True)
class Health:
    """Checks of one run. Each raises NumericsError with stage, step and advice.

    precision, guidance: those of the run, to name a likely cause.
    enabled: False turns all checks off. model: value of --model that names it.
    """

    precision: Precision
    guidance: float
    enabled: bool = True
    model: str = ""

    def check_text(self, states: mx.array) -> None:
        """Check text states [n, D]."""
        if not self.enabled:
            return
        found = _ArrayStats.from_array(states)
        if not found.finite:
            fix = _overflow_advice(self.precision.text_encoder, self.model)
            raise NumericsError("NaN or Inf in the text states (stage encode).", fix)
        if found.flat:
            what = "zero" if found.high == 0 else "the same number"
            raise NumericsError(
                f"All text states are {what} (stage encode): the prompt would have no effect.",
                f"The text encoder may be damaged. {_ANYWAY}; {_doctor(self.model)}",
            )

    def check_media(self, latents: mx.array) -> None:
        """Check latents of conditioning images or videos, [1, T, h, w, C]."""
        if self.enabled and not mx.isfinite(latents).all().item():
            raise NumericsError(
                "NaN or Inf in the latents of the media (stage read).",
                _vae_advice(self.precision.vae, "The VAE's encoder may be damaged", self.model),
            )

    def check_latents(
        self, z: mx.array, index: int, total: int, *, conditioned: bool = False
    ) -> None:
        """Check latents [1, T, h, w, C] after step `index` (from 0) of `total`.

        conditioned: some frames come from media, which may be identical.
        """
        if not self.enabled:
            return
        found = _ArrayStats.from_array(z, compare_frames=not conditioned)
        when = f"after step {index + 1} of {total} (stage denoise)"
        if not found.finite:
            fix = _overflow_advice(self.precision.transformer, self.model)
            raise NumericsError(f"NaN or Inf in the latents {when}.", fix)
        if found.rms > EXPLODED:
            fix = f"The transformer may be damaged. {_ANYWAY}; {_doctor(self.model)}"
            if self.guidance > HIGH_GUIDANCE:
                fix = f"--guidance {self.guidance:g} may be too high: lower it. {_ANYWAY}."
            raise NumericsError(
                f"The latents explode: their RMS is {found.rms:.3g} {when}, usual is about 1.",
                fix,
            )
        if found.flat or found.identical_frames:
            what = "are the same number" if found.flat else "of all frames are the same"
            raise NumericsError(
                f"The latents {what} {when}.",
                f"The transformer may be damaged. {_ANYWAY}; {_doctor(self.model)}",
            )

    def frame_health(self) -> FrameHealth:
        """Return the check of the frames of one clip."""
        return FrameHealth(self.enabled, self.precision.vae, self.model)


def _doctor(model: str) -> str:
    return f"to check the weights: python -m mlx_sora doctor {shell_words(model)}"


def _overflow_advice(dtype: mx.Dtype, model: str, option: str = "--dtype") -> str:
    """Return what to do about NaN or Inf from a network in `dtype`, the value of `option`."""
    if dtype == mx.float32:
        return f"Sound weights do not overflow in float32; {_doctor(model)}"
    wider = "float32"
    if dtype == mx.float16:
        wider = f"bfloat16: float16 ends at {mx.finfo(dtype).max:.0f}"
    return f"Try {option} {wider}. If that does not help, {_doctor(model)}"


def _vae_advice(dtype: mx.Dtype, damage: str, model: str) -> str:
    if dtype == mx.float32:
        return f"{damage}; {_doctor(model)}"
    return _overflow_advice(dtype, model, "--vae-dtype")


class FrameHealth:
    """Checks of a clip's frames, float [n, H, W, 3], nominally in [-1, 1], chunk by chunk.

    dtype: of the VAE. model: as in Health.
    """

    def __init__(self, enabled: bool = True, dtype: mx.Dtype = mx.float32, model: str = "") -> None:
        self._enabled, self._dtype, self._model = enabled, dtype, model
        self._count = 0
        self._black = self._white = self._flat = self._identical = True
        #: The first frame, while all others are identical.
        self._first: mx.array | None = None

    def add(self, frames: mx.array) -> None:
        """Check the next frames. Raises NumericsError for NaN and Inf."""
        if not self._enabled:
            return
        if self._first is None and self._identical:
            self._first = frames[0] * 1  # a slice would keep the whole chunk in memory
        found = _ArrayStats.from_array(frames)
        if not found.finite:
            raise NumericsError(
                f"NaN or Inf in frames {self._count} to {self._count + len(frames) - 1} "
                "(stage decode).",
                _vae_advice(self._dtype, "The VAE may be damaged", self._model),
            )
        self._count += len(frames)
        self._black &= found.high <= -1
        self._white &= found.low >= 1
        if self._first is not None:
            first = self._first
            same = mx.stack([(frames == first).all(), (mx.abs(frames - first[0, 0]) <= FLAT).all()])
            identical, flat = same.tolist()  # type: ignore[misc]
            self._identical, self._flat = bool(identical), self._flat and bool(flat)
            if not self._identical:
                self._first = None

    def finish(self) -> None:
        """Check all frames together. Raises NumericsError if they cannot be a video."""
        if not self._enabled:
            return
        if self._flat and self._identical:
            what = "All pixels of all frames have one colour"
        elif self._black or self._white:
            what = f"All values of all frames are {'below black' if self._black else 'above white'}"
        elif self._identical and self._count > 1:
            what = f"All {self._count} frames are bit-identical"
        else:
            return
        raise NumericsError(
            f"{what} (stage decode).",
            f"The VAE may be damaged. {_ANYWAY}; {_doctor(self._model)}",
        )


@dataclass(frozen=True)
class _ArrayStats:
    finite: bool
    low: float
    high: float
    rms: float
    identical_frames: bool

    @classmethod
    def from_array(cls, x: mx.array, *, compare_frames: bool = False) -> _ArrayStats:
        """Compute all statistics in one evaluation. compare_frames: along axis 1."""
        x = x.astype(mx.float32)
        stats = [mx.isfinite(x).all(), x.min(), x.max(), mx.sqrt(mx.mean(x * x))]
        if compare_frames and x.shape[1] > 1:
            stats.append((x == x[:, :1]).all())
        values: list[float] = mx.stack([each.astype(mx.float32) for each in stats]).tolist()  # type: ignore[assignment]
        finite, low, high, rms, *same = values
        return cls(finite == 1, low, high, rms, same == [1.0])

    @property
    def flat(self) -> bool:
        return self.high - self.low <= FLAT * max(1.0, abs(self.high))
