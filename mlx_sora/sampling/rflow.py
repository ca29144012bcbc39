"""Rectified flow with Euler steps; mirrors RFLOW and RFlowScheduler of Open-Sora 1.2."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.errors import UsageError
from mlx_sora.sampling.base import NOISE_TIME, State, Step, VelocityFn

#: Area in pixels of an image whose times do not shift.
BASE_AREA = 512 * 512

#: The shift counts 5 latents for every whole chunk of this many frames, and ignores the rest.
FRAMES_PER_CHUNK = 17


def add_noise(x: mx.array, noise: mx.array, t: mx.array) -> mx.array:
    """Return x [B, ...] at flow times t [B]: (1 - t/1000) x + t/1000 noise."""
    weight = (1.0 - t / NOISE_TIME).reshape(-1, *(1,) * (x.ndim - 1))
    return weight * x + (1.0 - weight) * noise


def timestep_transform(
    t: mx.array, height: mx.array, width: mx.array, num_frames: mx.array
) -> mx.array:
    """Shift flow times t [..., B] towards noise, the more the larger the video.

    height, width, num_frames: sizes [B] in pixels and frames; the ratio is computed in their type.
    Mirrors the function of this name in Open-Sora 1.2.
    """
    latents = mx.where(num_frames == 1, num_frames, num_frames // FRAMES_PER_CHUNK * 5)
    ratio = mx.sqrt(height * width / BASE_AREA) * mx.sqrt(latents)
    u = t / NOISE_TIME
    return ratio * u / (1.0 + (ratio - 1.0) * u) * NOISE_TIME


@dataclass(frozen=True)
class RFlow:
    """Sampler with Euler steps, at uniform flow times shifted by size and length.

    use_discrete_timesteps: round the times to whole numbers before the shift.
    use_timestep_transform: shift the times; both names are those of the reference.
    dtype: of the arithmetic with sizes (the reference uses the type of its network).
    """

    use_discrete_timesteps: bool = False
    use_timestep_transform: bool = True
    dtype: mx.Dtype = mx.float32

    @property
    def evaluations(self) -> int:
        return 1

    def timesteps(
        self,
        steps: int,
        *,
        height: float | mx.array,
        width: float | mx.array,
        num_frames: float | mx.array,
    ) -> mx.array:
        """Return flow times float32 [steps + 1, B]; see Sampler.timesteps.

        Raises UsageError for 0 steps, and for 2 to 16 frames (the shift is 0/0 there).
        """
        if steps < 1:
            raise UsageError(f"Cannot denoise in {steps} steps.", "Ask for at least 1 step.")
        uniform = [(1.0 - i / steps) * NOISE_TIME for i in range(steps)]
        if self.use_discrete_timesteps:
            uniform = [float(round(t)) for t in uniform]
        # On the CPU, so that a request has the same schedule on every device.
        with mx.stream(mx.cpu):
            sizes = [mx.array(n, self.dtype).reshape(-1) for n in (height, width, num_frames)]
            t = mx.array(uniform)[:, None] + mx.zeros(max(n.size for n in sizes))
            if self.use_timestep_transform:
                _check_frames(sizes[2])
                t = timestep_transform(t, *sizes)
            # Rounding can lift the first time over 1000, and masks compare with it.
            t = mx.minimum(t, NOISE_TIME)
            t = mx.concatenate([t, mx.zeros_like(t[:1])])
            mx.eval(t)
        return t

    def step(
        self, velocity_fn: VelocityFn, z: mx.array, v: mx.array, step: Step, history: State, /
    ) -> mx.array:
        """Return z after one Euler step."""
        return z + v * step.dt


def _check_frames(num_frames: mx.array) -> None:
    if mx.any((num_frames != 1) & (num_frames < FRAMES_PER_CHUNK)).item():
        raise UsageError(
            f"The timestep schedule is undefined for 2 to {FRAMES_PER_CHUNK - 1} frames.",
            f"Ask for 1 frame or for at least {FRAMES_PER_CHUNK}.",
        )
