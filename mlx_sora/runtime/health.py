"""Whether what a run makes can still become a video: looked at after every stage and every step.

Only what no prompt can mean stops a run: NaN and Inf, arrays without any variance, frames alike to
the last bit, pictures beyond black or white everywhere, latents far outside what flow matching
gives. A still video, a white one or noise pass. Each look is one evaluation of a few reductions.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.errors import NumericsError

#: Root mean square of latents that no flow from unit noise to latents of unit variance comes near.
EXPLODED = 50.0

#: Guidance from which it is the likelier cause of that than the weights.
HIGH_GUIDANCE = 15.0

#: Differences that are rounding and nothing else, as a share of the largest value.
FLAT = 1e-6

_DOCTOR = "check the weights with: python -m mlx_sora doctor."
_ANYWAY = "--no-health-check goes on all the same."


@dataclass(frozen=True)
class Health:
    """Checks of one run. dtype, guidance: of the run, for the likely cause; enabled: if at all.

    Each check raises NumericsError with stage, step and what to do. Arrays are evaluated.
    """

    dtype: mx.Dtype
    guidance: float
    enabled: bool = True

    def check_text(self, states: mx.array) -> None:
        """Text states [n, D]."""
        if not self.enabled:
            return
        found = _Values.of(states)
        if not found.finite:
            raise NumericsError("NaN or Inf in the text states (stage encode).", self._overflow())
        if found.flat:
            what = "zero" if found.high == 0 else "the same number"
            raise NumericsError(
                f"All text states are {what} (stage encode): the prompt says nothing.",
                f"The text encoder may be damaged: {_DOCTOR} {_ANYWAY}",
            )

    def check_media(self, latents: mx.array) -> None:
        """Latents of pictures or videos that were given, [1, T, h, w, C]."""
        if self.enabled and not mx.isfinite(latents).all().item():
            raise NumericsError(
                "NaN or Inf in the latents of what was given (stage read).",
                f"The VAE's encoder may be damaged: {_DOCTOR}",
            )

    def check_latents(
        self, z: mx.array, index: int, total: int, *, conditioned: bool = False
    ) -> None:
        """Latents [1, T, h, w, C] after step `index` (from 0) of `total`.

        given: some frames come from media, which may be alike.
        """
        if not self.enabled:
            return
        found = _Values.of(z, alike=not conditioned)
        when = f"after step {index + 1} of {total} (stage denoise)"
        if not found.finite:
            raise NumericsError(f"NaN or Inf in the latents {when}.", self._overflow())
        if found.rms > EXPLODED:
            raise NumericsError(
                f"The latents explode: their size is {found.rms:.3g} {when}, near 1 is usual.",
                self._too_large(),
            )
        if found.flat or found.alike:
            how = "are one number everywhere" if found.flat else "of all frames are the same"
            raise NumericsError(
                f"The latents {how} {when}.", f"The transformer may be damaged: {_DOCTOR} {_ANYWAY}"
            )

    def frame_health(self) -> FrameHealth:
        """Checks for the frames of one clip."""
        return FrameHealth(self.enabled)

    def _overflow(self) -> str:
        if self.dtype != mx.float32:
            return f"Try --dtype float32; if it stays, {_DOCTOR}"
        return f"In float32 nothing overflows by itself; {_DOCTOR}"

    def _too_large(self) -> str:
        if self.guidance > HIGH_GUIDANCE:
            return f"--guidance {self.guidance:g} may be too high: lower it. {_ANYWAY}"
        return f"The transformer may be damaged or of another model: {_DOCTOR} {_ANYWAY}"


class FrameHealth:
    """Checks of a clip's frames, float [n, H, W, 3], nominally in [-1, 1], chunk by chunk."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._count = 0
        self._black = self._white = self._flat = self._alike = True
        #: The first frame, for as long as all others have been like it.
        self._first: mx.array | None = None

    def add(self, frames: mx.array) -> None:
        """Look at the next frames. Raises NumericsError for NaN and Inf at once."""
        if not self._enabled:
            return
        if self._first is None and self._alike:
            self._first = frames[0] * 1  # a slice would keep the whole chunk in memory
        found = _Values.of(frames)
        if not found.finite:
            raise NumericsError(
                f"NaN or Inf in frames {self._count} to {self._count + len(frames) - 1} "
                "(stage decode).",
                f"The VAE may be damaged, or of another model: {_DOCTOR}",
            )
        self._count += len(frames)
        self._black &= found.high <= -1
        self._white &= found.low >= 1
        if self._first is not None:
            first = self._first
            same = mx.stack([(frames == first).all(), (mx.abs(frames - first[0, 0]) <= FLAT).all()])
            alike, flat = same.tolist()  # type: ignore[misc]
            self._alike, self._flat = bool(alike), self._flat and bool(flat)
            if not self._alike:
                self._first = None

    def finish(self) -> None:
        """All frames have been added. Raises NumericsError where together they are no video."""
        if not self._enabled:
            return
        if self._flat and self._alike:
            how = "All frames are one colour, the same in every pixel"
        elif self._black or self._white:
            how = f"All frames are {'black' if self._black else 'white'}, and beyond"
        elif self._alike and self._count > 1:
            how = f"All {self._count} frames are the same, to the last bit"
        else:
            return
        raise NumericsError(
            f"{how} (stage decode).",
            f"The VAE may be damaged, or of another model: {_DOCTOR} {_ANYWAY}",
        )


@dataclass(frozen=True)
class _Values:
    """What is to be known of an array. alike: all of axis 1 is the same, where asked for."""

    finite: bool
    low: float
    high: float
    rms: float
    alike: bool

    @classmethod
    def of(cls, x: mx.array, *, alike: bool = False) -> _Values:
        """By one evaluation."""
        x = x.astype(mx.float32)
        looks = [mx.isfinite(x).all(), x.min(), x.max(), mx.sqrt(mx.mean(x * x))]
        if alike and x.shape[1] > 1:
            looks.append((x == x[:, :1]).all())
        looked: list[float] = mx.stack([look.astype(mx.float32) for look in looks]).tolist()  # type: ignore[assignment]
        finite, low, high, rms, *same = looked
        return cls(finite == 1, low, high, rms, same == [1.0])

    @property
    def flat(self) -> bool:
        return self.high - self.low <= FLAT * max(1.0, abs(self.high))
