"""Progress events that a run yields: plain data, no drawing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

    from mlx_sora.errors import MlxSoraError
    from mlx_sora.video import Video

#: Stages of every run, in order. Decoding includes writing the file. A stage "read" that encodes
#: media may come before denoising. Each clip has its own denoising and decoding.
STAGES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a run will have, in the order of its stages.

    total: its units of work. work: its operations. done: units that an earlier run has made.
    clip, clips: place among the clips of its video. request: place among several requests.
    pass_index, passes: place among the passes of the clip.
    """

    stage: str
    total: int
    work: float
    done: int = 0
    clip: int = 0
    clips: int = 1
    request: int = 0
    pass_index: int = 0
    passes: int = 1


@dataclass(frozen=True)
class RunPlanned:
    """The stages of a run, or of several requests, before the first one."""

    stages: tuple[PlannedStage, ...]


@dataclass(frozen=True)
class StageStarted:
    """A stage begins. total: its units of work (prompts, steps, frames)."""

    stage: str
    total: int


@dataclass(frozen=True)
class StageProgress:
    """`done` of `total` units of a stage are finished (frames decoded, prompts encoded)."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class StepFinished:
    """A denoising step is finished.

    step: index from 0.
    t: flow time before the step, in [0, 1000].
    latents: z after the step, [B, T, H, W, C], in normalised latent space.
    """

    step: int
    total: int
    t: float
    seconds: float
    latents: mx.array


@dataclass(frozen=True)
class PreviewReady:
    """A preview of x0 as predicted in `step`. path: file it was written to, or None.

    frames: uint8 [frames, height, width, 3], decoded; with a preview map of the model small, one
    per latent frame.
    """

    step: int
    frames: np.ndarray
    path: str | None = None


@dataclass(frozen=True)
class StageFinished:
    """A stage is finished: wall seconds, peaks of MLX's allocator and the resident set in bytes."""

    stage: str
    seconds: float
    peak_memory: int
    peak_rss: int


@dataclass(frozen=True)
class Warned:
    """A warning for the user, also recorded in the video's metadata."""

    message: str


@dataclass(frozen=True)
class Noted:
    """A note for the user, such as what an acceleration did."""

    message: str


@dataclass(frozen=True)
class RequestStarted:
    """Request `index` (from 0) of several begins. Its text is already encoded."""

    index: int
    total: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class RequestFailed:
    """Request `index` (from 0) of several failed. The others continue."""

    index: int
    error: MlxSoraError


@dataclass(frozen=True)
class Finished:
    """The run is finished. `video` has the path or the frames."""

    video: Video


Event = (
    RunPlanned
    | StageStarted
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
