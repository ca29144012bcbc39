"""Times of frames: the constant rate of a video, and which frames are shown at its ticks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, repeat
from typing import TYPE_CHECKING

from mlx_sora.geometry import Size

if TYPE_CHECKING:
    import numpy as np

#: Intervals of a constant rate differ from a usual one by less than this share.
JITTER = 0.5


#: Half a unit of the times of Matroska, in seconds, and a little for the others.
ROUNDING = 0.00051

#: Unit of the durations of GIF, in seconds. Rates that it cannot tell apart are whole numbers.
SMALLEST_DURATION = 0.01


@dataclass(frozen=True)
class TimedFrame:
    """Decoded frame of a video.

    start, duration: seconds; None if the file does not say. size: as shown. read: returns the
    pixels, uint8 [H, W, 3].
    """

    start: float | None
    duration: float | None
    size: Size
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Timing:
    """Constant rate of a video. repeats: of each decoded frame; empty if each is shown once."""

    fps: float
    repeats: tuple[int, ...] = ()

    @classmethod
    def from_starts(
        cls,
        starts: Sequence[float | None],
        last: float | None = None,
        rate: float | None = None,
        *,
        recorded: float | None = None,
    ) -> Timing:
        """Choose the rate of frames that begin at `starts`, in seconds.

        last: duration of the last frame, of an animation, whose frames last a multiple of the
        shortest; None: the last lasts as long as a usual one, which is the median. rate: frames
        per second where the times do not tell; times that are missing or out of order do not.
        recorded: rate at which the frames were written, before equal ones were joined.
        """
        known = [start for start in starts if start is not None]
        intervals = [after - before for before, after in pairwise(known)]
        if last is not None:
            intervals.append(last)
        typical = sorted(intervals)[len(intervals) // 2] if intervals else 0
        if len(known) < len(starts) or typical <= 0 or min(intervals) < 0:
            return cls(rate or 1)
        if last is not None:
            typical = min(intervals)
        usual = [each for each in intervals if abs(each - typical) < JITTER * typical]
        fps = recorded or len(usual) / sum(usual)
        if recorded is None and last is None and len(usual) == len(intervals):
            return cls(rate if rate and _has_rate(known, rate) else fps)
        if last is None:
            intervals.append(1 / fps)
        ticks = [round(fps * time) for time in accumulate(intervals, initial=0.0)]
        repeats = tuple(after - before for before, after in pairwise(ticks))
        whole = round(fps)
        if whole and abs(sum(repeats) / whole - sum(intervals)) < SMALLEST_DURATION:
            fps = whole
        return cls(fps, () if set(repeats) == {1} else repeats)

    def num_frames(self, decoded: int) -> int:
        """Return the number of frames at the constant rate."""
        return sum(self.repeats) if self.repeats else decoded

    def resample(self, frames: Iterable[TimedFrame]) -> Iterator[TimedFrame]:
        """Yield the frame of each tick; a repeated one is the same object."""
        if not self.repeats:
            yield from frames
        for frame, count in zip(frames, self.repeats, strict=False):
            yield from repeat(frame, count)


def _has_rate(starts: Sequence[float], rate: float) -> bool:
    """Return True if frames begin at a constant rate, but for the rounding of times."""
    return all(abs(s - starts[0] - i / rate) < 2 * ROUNDING for i, s in enumerate(starts))
