"""PSNR and SSIM of frames to those that they stand for, frame by frame."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

#: Side of SSIM's windows in pixels, and the constants of Wang et al. 2004 for values to 255.
WINDOW, _C1, _C2 = 7, (0.01 * 255) ** 2, (0.03 * 255) ** 2


class Similarity:
    """PSNR and SSIM over all frames that were added."""

    def __init__(self) -> None:
        self._frames = self._values = 0
        self._squares, self._ssim = 0, 0.0

    def add(self, frames: np.ndarray, expected: np.ndarray) -> None:
        """Compare frames, both uint8 [n, H, W, 3] of at least WINDOW pixels a side."""
        import numpy as np

        for frame, other in zip(frames, expected, strict=True):
            difference = frame.astype(np.int32) - other
            self._squares += int((difference * difference).sum())
            self._values += frame.size
            self._ssim += ssim(frame, other)
            self._frames += 1

    @property
    def psnr(self) -> float | None:
        """PSNR in dB over all frames together; None if they are the same."""
        if not self._squares:
            return None
        return 10 * math.log10(255.0**2 * self._values / self._squares)

    @property
    def ssim(self) -> float:
        """Mean SSIM of the frames."""
        return self._ssim / self._frames

    def __str__(self) -> str:
        """Return both for people, such as "PSNR 34.2 dB, SSIM 0.981"."""
        psnr = "without end: the same frames" if self.psnr is None else f"{self.psnr:.1f} dB"
        return f"PSNR {psnr}, SSIM {self.ssim:.3f}"


def motion(frames: np.ndarray) -> float:
    """Return the mean change from frame to frame of uint8 [T, H, W, 3], in levels of 255."""
    import numpy as np

    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())


def ssim(frame: np.ndarray, other: np.ndarray) -> float:
    """Return the SSIM of two frames uint8 [H, W, 3], the mean over windows and channels.

    It is that of scikit-image's structural_similarity with its defaults.
    """
    pairs = ((frame[..., channel], other[..., channel]) for channel in range(frame.shape[-1]))
    return sum(_channel_ssim(*pair) for pair in pairs) / int(frame.shape[-1])


def _channel_ssim(x: np.ndarray, y: np.ndarray) -> float:
    import numpy as np

    a, b = x.astype(np.int64), y.astype(np.int64)
    mean_a, mean_b = _window_means(a), _window_means(b)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    variances = _window_means(a * a + b * b) - mean_a * mean_a - mean_b * mean_b
    covariance = _window_means(a * b) - mean_a * mean_b
    found = (2 * mean_a * mean_b + _C1) / (mean_a * mean_a + mean_b * mean_b + _C1)
    found *= (2 * unbiased * covariance + _C2) / (unbiased * variances + _C2)
    return float(found.mean())


def _window_means(values: np.ndarray) -> np.ndarray:
    """Return the means of all windows inside an array of integers; sums of integers are exact."""
    import numpy as np

    sums = np.pad(values, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    lines = sums[WINDOW:] - sums[:-WINDOW]
    means: np.ndarray = (lines[:, WINDOW:] - lines[:, :-WINDOW]) / WINDOW**2
    return means
