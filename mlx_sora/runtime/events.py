"""Typed progress events: what a run tells whoever watches it. Plain data, no drawing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

    from mlx_sora.errors import MlxSoraError
    from mlx_sora.video import Video

#: Stage names in order: text encoding, denoising, decoding (the writer runs inside decoding). Media
#: are encoded in a stage "read" before denoising; clips are denoised and decoded in turn.
STAGES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class StageStarted:
    """Stage `stage` begins; `total` units of work follow (prompts, steps, frames)."""

    stage: str
    total: int


@dataclass(frozen=True)
class StageProgress:
    """`done` of `total` units of `stage` are finished (frames decoded, prompts encoded)."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class StepFinished:
    """One denoising step: index from 0, flow time `t` in [0, 1000] before it, seconds it took.

    latents: z after the step, [B, T, H, W, C], normalised latent space.
    """

    step: int
    total: int
    t: float
    seconds: float
    latents: mx.array


@dataclass(frozen=True)
class PreviewReady:
    """x0 as foreseen in `step`: uint8 [frames, height, width, 3]; path: where it was written.

    Small, a picture per latent frame, where the model has a map for previews; else as decoded.
    """

    step: int
    frames: np.ndarray
    path: str | None = None


@dataclass(frozen=True)
class StageFinished:
    """Stage done: wall seconds, peak of MLX's allocator and of the resident set, in bytes."""

    stage: str
    seconds: float
    peak_memory: int
    peak_rss: int


@dataclass(frozen=True)
class Warned:
    """Something the user should know; also recorded in the video's metadata."""

    message: str


@dataclass(frozen=True)
class Noted:
    """Something worth a line that is no warning, such as what an acceleration did."""

    message: str


@dataclass(frozen=True)
class RequestStarted:
    """Of several requests, number `index` of `total` (from 0) begins; its text is encoded."""

    index: int
    total: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class RequestFailed:
    """Of several requests, number `index` (from 0) failed; the others go on."""

    index: int
    error: MlxSoraError


@dataclass(frozen=True)
class Finished:
    """The run is over; `video` holds the path or the frames."""

    video: Video


Event = (
    StageStarted
    | StageProgress
    | StepFinished
    | PreviewReady
    | StageFinished
    | Warned
    | Noted
    | RequestStarted
    | RequestFailed
    | Finished
)
