"""Long videos as clips: each but the first starts with the last frames of the one before.

Frames are numbered over the whole video. Frames that two clips share are shown once, from the
earlier clip, so that n clips of F frames that share c have F + (n - 1)(F - c) frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        for name, frames, fix in (
            ("--condition-frames", self.shared_frames, f"--condition-frames {MICRO_FRAME_SIZE}"),
            ("--num-frames", self.num_frames, self._longer()),
        ):
            if frames % MICRO_FRAME_SIZE or frames < MICRO_FRAME_SIZE:
                raise UsageError(
                    f"With --loop, {name} {frames} is not a whole number of VAE chunks.",
                    f"Give {fix}.",
                )
        if self.shared_frames >= self.num_frames:
            less = self.num_frames - MICRO_FRAME_SIZE
            shorter = f", or --condition-frames {less}" if less else ""
            raise UsageError(
                f"Clips of --num-frames {self.num_frames} that share --condition-frames "
                f"{self.shared_frames} add nothing.",
                f"Give {self._longer()}{shorter}.",
            )

    def hint(self) -> str:
        """Return the flags that make these clips; change what does not fit."""
        shared = self.shared_frames % MICRO_FRAME_SIZE == 0
        clips = self if shared else replace(self, shared_frames=MICRO_FRAME_SIZE)
        flags = f"--loop {self.count}"
        if self.num_frames % MICRO_FRAME_SIZE or clips.shared_frames >= self.num_frames:
            flags += f" {clips._longer()}"
        return flags if shared else f"{flags} --condition-frames {MICRO_FRAME_SIZE}"

    def _longer(self) -> str:
        """Return the flag of the next length that neighbours can share."""
        chunks = max(self.num_frames - 1, self.shared_frames) // MICRO_FRAME_SIZE + 1
        return f"--num-frames {chunks * MICRO_FRAME_SIZE}"

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
