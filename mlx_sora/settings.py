"""A request with every open option decided: what the pipeline really runs.

The request stays as the user gave it; the model's defaults fill what it leaves open. Whatever is
not taken literally comes back as a warning, which the progress line and the metadata both show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlx_sora.accel import ACCELERATIONS, OFF
from mlx_sora.errors import UsageError
from mlx_sora.geometry import (
    IMAGE_FPS,
    Geometry,
    Size,
    parse_frames,
    plan_geometry,
    resolve_size,
)
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.request import GenerationRequest
from mlx_sora.runtime.profiles import parse_bytes, profile
from mlx_sora.text import prompt as syntax


@dataclass(frozen=True)
class Settings:
    """Every option decided.

    text: the prompt as the text encoder gets it, scored and cleaned. geometry: sizes and latent
    shape. fps: of the finished file. accelerations: name to mode, those that are off too.
    memory_budget: bytes of the whole process, if it is bounded.
    """

    model: str
    text: str
    seed: int
    steps: int
    guidance: float
    sampler: str
    geometry: Geometry
    fps: float
    aesthetic: float | None
    motion: float | None
    camera: str | None
    accelerations: Mapping[str, str]
    memory_budget: int | None

    @property
    def conditioning_fps(self) -> float:
        """The fps that the transformer is conditioned on."""
        return IMAGE_FPS if self.geometry.num_frames == 1 else self.fps

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for the metadata."""
        record = asdict(self) | dict(self.accelerations)
        del record["accelerations"]
        geometry = record.pop("geometry")
        width, height = geometry["size"]
        return record | {"width": width, "height": height, "num_frames": geometry["num_frames"]}


def settle(request: GenerationRequest, model: ModelFolder) -> tuple[Settings, list[str]]:
    """Decide every option of a validated request that has a seed; also the warnings.

    Raises UsageError for sizes and lengths that no model can make.
    """
    assert request.seed is not None, "call request.with_seed() first"
    defaults = model.defaults
    size = resolve_size(
        Size(defaults.width, defaults.height),
        resolution=request.resolution,
        aspect_ratio=request.aspect_ratio,
        width=request.width,
        height=request.height,
    )
    frames = defaults.num_frames if request.num_frames is None else request.num_frames
    geometry = plan_geometry(size, parse_frames(frames))
    warnings = list(geometry.warnings)
    if 1 < geometry.num_frames < defaults.warn_below_frames:
        warnings.append(
            f"{geometry.num_frames} frames are few for {model.name}: "
            f"below {defaults.warn_below_frames} it tends to noise."
        )

    def chosen(name: str) -> Any:
        value = getattr(request, name)
        return getattr(defaults, name) if value is None else value

    scores = syntax.Scores(chosen("aesthetic"), request.motion, request.camera)
    text, remarks = _text(request.prompt, scores)
    settings = Settings(
        model=model.name,
        text=text,
        seed=request.seed,
        steps=chosen("steps"),
        guidance=chosen("guidance"),
        sampler=request.sampler,
        geometry=geometry,
        fps=chosen("fps"),
        aesthetic=scores.aesthetic,
        motion=request.motion,
        camera=request.camera,
        accelerations={name: getattr(request, name) or OFF for name in ACCELERATIONS},
        memory_budget=_budget(request),
    )
    return settings, warnings + remarks


def _text(prompt: str, scores: syntax.Scores) -> tuple[str, list[str]]:
    """Text for the encoder, and what of the prompt it leaves out.

    Raises UsageError for settings inside the prompt: they ask for conditioning on images.
    """
    read = syntax.prepare_prompt(prompt, scores)
    if read.settings != syntax.Settings():
        raise UsageError(
            "The prompt asks for conditioning on images or videos, which cannot be done yet.",
            "Remove the braces and what is in them.",
        )
    warnings = []
    if len(read.scenes) > 1:
        warnings.append(f"The prompt has {len(read.scenes)} scenes; only the first is made.")
    text = read.text()
    if not syntax.prepare_prompt(prompt).text():
        warnings.append("Nothing is left of the prompt after cleaning; the model gets no subject.")
    return text, warnings


def _budget(request: GenerationRequest) -> int | None:
    """Bytes the process may use. Raises UsageError for unknown amounts and profiles, and both."""
    if request.memory_budget is not None and request.device_profile is not None:
        raise UsageError("--memory-budget and --device-profile exclude each other.", "Give one.")
    if request.device_profile is not None:
        return profile(request.device_profile)
    return None if request.memory_budget is None else parse_bytes(request.memory_budget)
