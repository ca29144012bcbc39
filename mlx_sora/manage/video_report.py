"""Videos of Open-Sora 1.2 that a measured machine can make, before anything is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_sora.errors import MemoryBudgetError
from mlx_sora.loading.model_folder import PUBLISHED, find_model
from mlx_sora.loading.published import find_undownloaded
from mlx_sora.memory.estimate import format_duration
from mlx_sora.memory.profiles import format_bytes
from mlx_sora.memory.speeds import MachineSpeeds
from mlx_sora.pipeline.pipeline import Pipeline
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.request.generation import GenerationRequest

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

#: Options that need less memory, in the order in which they are tried: exact ones first.
WAYS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "--sequential-guidance": {"sequential_guidance": True},
    "--vae-tiles 2": {"vae_tiles": 2},
    "--sequential-guidance --vae-tiles 2": {"sequential_guidance": True, "vae_tiles": 2},
    "--sequential-guidance --vae-tiles 4": {"sequential_guidance": True, "vae_tiles": 4},
}

#: Preset whose seconds stand beside the exact ones.
FAST = "fast"


@dataclass(frozen=True)
class VideoEstimate:
    """Estimate of one video. options: needed to fit.

    seconds, fast_seconds: with 30 steps, and with `--preset fast`; None if it does not fit. peak:
    bytes of the process.
    """

    name: str
    options: str = ""
    seconds: float | None = None
    fast_seconds: float | None = None
    peak: int = 0

    def __str__(self) -> str:
        """Return one line without the name."""
        if self.seconds is None or self.fast_seconds is None:
            return "does not fit into this memory"
        times = format_duration(self.seconds), format_duration(self.fast_seconds)
        needs = f", needs {self.options}" if self.options else ""
        return f"{times[0]}, {times[1]} with --preset {FAST}, {format_bytes(self.peak)}{needs}"


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
        for options, values in WAYS.items():
            smaller = replace(request, **values)
            try:
                run, fast = (pipeline.prepare(replace(smaller, preset=p)) for p in (None, FAST))
            except MemoryBudgetError:
                continue
            yield _estimate(name, options, speeds, run, fast)
            break
        else:
            yield VideoEstimate(name)


def _estimate(
    name: str, options: str, speeds: MachineSpeeds, run: GenerationRun, fast: GenerationRun
) -> VideoEstimate:
    seconds, fast_seconds = (each.estimate(speeds).total for each in (run, fast))
    return VideoEstimate(name, options, seconds, fast_seconds, run.plan.peak)
