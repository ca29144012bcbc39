"""Videos of Open-Sora 1.2 that a measured machine can make, before anything is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_sora.errors import MemoryBudgetError
from mlx_sora.loading.model_folder import PUBLISHED, find_model
from mlx_sora.loading.published import find_undownloaded
from mlx_sora.memory.profiles import format_bytes
from mlx_sora.memory.speeds import MachineSpeeds
from mlx_sora.models.ops import on_gpu
from mlx_sora.pipeline.pipeline import Pipeline
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.progress import format_duration

#: Resolutions and lengths of the table.
VIDEOS = (
    ("144p", 51),
    ("240p", 1),
    ("240p", 51),
    ("240p", 102),
    ("360p", 51),
    ("480p", 51),
    ("720p", 51),
)

_SEQUENTIAL: Mapping[str, Any] = {"sequential_guidance": True}
_HALF: Mapping[str, Any] = {"vae_dtype": "bfloat16"}

#: Options that need less memory, in the order in which they are tried: exact ones first. The VAE in
#: half precision is for GPUs.
WAYS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "--sequential-guidance": _SEQUENTIAL,
    "--vae-dtype bfloat16": _HALF,
    "--sequential-guidance --vae-dtype bfloat16": {**_SEQUENTIAL, **_HALF},
    "--vae-tiles 2": {"vae_tiles": 2},
    "--sequential-guidance --vae-tiles 2": {**_SEQUENTIAL, "vae_tiles": 2},
    "--sequential-guidance --vae-dtype bfloat16 --vae-tiles 2": {
        **_SEQUENTIAL,
        **_HALF,
        "vae_tiles": 2,
    },
    "--sequential-guidance --vae-tiles 4": {**_SEQUENTIAL, "vae_tiles": 4},
}

#: Preset whose seconds stand beside the exact ones.
FAST = "fast"


@dataclass(frozen=True)
class VideoEstimate:
    """Estimate of one video. options: needed to fit.

    seconds, fast_seconds: with 30 steps, and with `--preset fast`; None for what does not fit.
    peak: bytes of the process.
    """

    name: str
    options: str = ""
    seconds: float | None = None
    fast_seconds: float | None = None
    peak: int = 0

    def __str__(self) -> str:
        """Return one line without the name."""
        if self.seconds is None:
            return "does not fit into this memory"
        parts = [format_duration(self.seconds)]
        if self.fast_seconds is not None:
            parts.append(f"{format_duration(self.fast_seconds)} with --preset {FAST}")
        parts.append(format_bytes(self.peak))
        if self.options:
            parts.append(f"needs {self.options}")
        return ", ".join(parts)


def estimate_videos(speeds: MachineSpeeds) -> Iterator[VideoEstimate]:
    """Yield an estimate of each video, within the memory that `--memory-budget auto` allows."""
    pipeline = Pipeline(find_undownloaded(PUBLISHED) or find_model(PUBLISHED))
    for resolution, frames in VIDEOS:
        name = f"{resolution}, {frames} frames" if frames > 1 else f"{resolution}, an image"
        request = GenerationRequest(
            prompt="a lighthouse on a cliff at dusk, waves break on the rocks below",
            resolution=resolution,
            num_frames=frames,
            memory_budget="auto",
        )
        yield _estimate(pipeline, request, name, speeds)


def _estimate(
    pipeline: Pipeline, request: GenerationRequest, name: str, speeds: MachineSpeeds
) -> VideoEstimate:
    """Estimate a video with the first options with which it fits."""
    for options, values in WAYS.items():
        if "vae_dtype" in values and not on_gpu():
            continue
        smaller = replace(request, **values)
        run = _prepare(pipeline, smaller)
        if run is not None:
            fast = _prepare(pipeline, replace(smaller, preset=FAST))
            fast_seconds = None if fast is None else fast.estimate(speeds).total
            seconds = run.estimate(speeds).total
            return VideoEstimate(name, options, seconds, fast_seconds, run.plan.peak)
    return VideoEstimate(name)


def _prepare(pipeline: Pipeline, request: GenerationRequest) -> GenerationRun | None:
    """Return the run of a request, or None if it does not fit."""
    try:
        return pipeline.prepare(request)
    except MemoryBudgetError:
        return None
