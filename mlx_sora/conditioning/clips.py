"""Long videos as clips: each but the first starts with the last frames of the one before.

Frames are numbered over the whole video. Frames that two clips share are shown once, from the
earlier clip, so that n clips of F frames that share c have F + (n - 1)(F - c) frames.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_sora.errors import UsageError
from mlx_sora.geometry import MICRO_FRAME_SIZE, latent_frames


@dataclass(frozen=True)
class Clips:
    """`count` clips of `num_frames` frames; neighbours share `shared_frames`."""

    num_frames: int
    count: int = 1
    shared_frames: int = MICRO_FRAME_SIZE

    def check(self) -> None:
        """Raise UsageError if the clips cannot be joined without a gap."""
        if self.count == 1:
            return
        for name, frames in (
            ("--condition-frames", self.shared_frames),
            ("--num-frames", self.num_frames),
        ):
            if frames % MICRO_FRAME_SIZE or frames < MICRO_FRAME_SIZE:
                raise UsageError(
                    f"With --loop, {name} {frames} is not a whole number of VAE chunks.",
                    f"Give a multiple of {MICRO_FRAME_SIZE}.",
                )
        if self.shared_frames >= self.num_frames:
            raise UsageError(
                f"Clips of {self.num_frames} frames that share {self.shared_frames} add nothing.",
                "Raise --num-frames, or lower --condition-frames.",
            )

    @property
    def total(self) -> int:
        """Frames of the whole video."""
        return self.num_frames + (self.count - 1) * (self.num_frames - self.shared_frames)

    @property
    def shared_latents(self) -> int:
        """Latent frames that two neighbours share."""
        return latent_frames(self.shared_frames)

    def frames_to_skip(self, clip: int) -> int:
        """Return the number of first frames of `clip` that the clip before has shown."""
        return self.shared_frames if clip else 0

    def locate(self, frame: int) -> tuple[int, int]:
        """Return the clip that shows frame `frame` of the video, and its number in that clip."""
        step = self.num_frames - self.shared_frames
        clip = 0 if frame < self.num_frames else 1 + (frame - self.num_frames) // step
        return clip, frame - clip * step
