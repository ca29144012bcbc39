"""A request with every open option decided: what the pipeline really runs.

The request stays as the user gave it; the model's defaults fill what it leaves open. Whatever is
not taken literally comes back as a warning, which the progress line and the metadata both show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from mlx_sora.accel import ACCELERATIONS, OFF
from mlx_sora.conditioning.clips import Clips
from mlx_sora.conditioning.media import Media, plan_media
from mlx_sora.errors import UsageError
from mlx_sora.geometry import (
    Geometry,
    ModelArguments,
    Size,
    model_arguments,
    parse_frames,
    plan_geometry,
    resolve_size,
)
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.memory.profiles import parse_bytes, profile
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.text import prompt as syntax
from mlx_sora.text.cleaning import preprocess


@dataclass(frozen=True)
class ResolvedRequest:
    """Every option decided.

    texts: the prompt as the text encoder gets it, scored and cleaned, for each clip. negative: the
    same of the negative prompt. geometry: sizes and latent shape of a clip. media: what is given of
    the clips. fps: of the finished file. accelerations: name to mode, those that are off too.
    memory_budget: bytes of the whole process, if it is bounded. vae_tiles: in a row, 1 for none.
    """

    model: str
    texts: tuple[str, ...]
    negative: str | None
    seed: int
    steps: int
    guidance: float
    sampler: str
    geometry: Geometry
    media: Media
    fps: float
    aesthetic: float | None
    motion: float | None
    camera: str | None
    accelerations: Mapping[str, str]
    memory_budget: int | None
    vae_tiles: int

    @property
    def text(self) -> str:
        """Text of the first clip."""
        return self.texts[0]

    @property
    def clips(self) -> Clips:
        """The clips that the video consists of."""
        return self.media.clips

    @property
    def all_texts(self) -> list[str]:
        """Every text to encode, once."""
        negative = [] if self.negative is None else [self.negative]
        return list(dict.fromkeys([*self.texts, *negative]))

    @property
    def model_args(self) -> ModelArguments:
        """What the networks are told of a clip."""
        return model_arguments(self.geometry.size, self.geometry.num_frames, self.fps)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for the metadata."""
        left_out = {"texts", "negative", "geometry", "media", "accelerations"}
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        record |= {"text": self.text, **self.accelerations}
        width, height = self.geometry.size
        record |= {"width": width, "height": height, "num_frames": self.geometry.num_frames}
        if len(set(self.texts)) > 1:
            record["scenes"] = list(self.texts)
        if self.negative is not None:
            record["negative_text"] = self.negative
        if self.media.sources:
            record["media"] = self.media.record()
        return record


def resolve(request: GenerationRequest, model: ModelFolder) -> tuple[ResolvedRequest, list[str]]:
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

    clips = Clips(geometry.num_frames, request.loop, request.condition_frames)
    clips.check()
    scores = syntax.Scores(chosen("aesthetic"), request.motion, request.camera)
    prompt = syntax.prepare_prompt(request.prompt, scores)
    media = plan_media(request, prompt.settings, clips, size, chosen("fps"))
    settings = ResolvedRequest(
        model=model.name,
        texts=tuple(map(prompt.text, range(clips.count))),
        negative=None if request.negative_prompt is None else preprocess(request.negative_prompt),
        seed=request.seed,
        steps=chosen("steps"),
        guidance=chosen("guidance"),
        sampler=request.sampler,
        geometry=geometry,
        media=media,
        fps=chosen("fps"),
        aesthetic=scores.aesthetic,
        motion=request.motion,
        camera=request.camera,
        accelerations={name: getattr(request, name) or OFF for name in ACCELERATIONS},
        memory_budget=_budget(request),
        vae_tiles=_tiles(request, geometry),
    )
    warnings += [*media.warnings, *_lost(request, prompt, settings)]
    return settings, warnings


def _lost(
    request: GenerationRequest, prompt: syntax.Prompt, settings: ResolvedRequest
) -> Iterable[str]:
    """What of the prompts has no effect."""
    made = settings.clips.count
    unmade = [scene for scene in prompt.scenes if scene.start >= made]
    if unmade:
        count = len(prompt.scenes)
        kept = count - len(unmade)
        only = "only the first is" if kept == 1 else f"only the first {kept} are"
        yield f"The prompt has {count} scenes; {only} made, for want of --loop."
    if not syntax.prepare_prompt(request.prompt).text():
        yield "Nothing is left of the prompt after cleaning; the model gets no subject."
    if settings.negative is not None and settings.guidance == 1:
        yield "--negative-prompt has no effect without guidance."


def _tiles(request: GenerationRequest, geometry: Geometry) -> int:
    """Tiles in a row that pictures are decoded in. Raises UsageError for pictures too small."""
    tiles = request.vae_tiles or 1
    if tiles > 1 and min(geometry.latent[1:]) < 2 * tiles:
        raise UsageError(
            f"{geometry.decoded} pixels are too few for --vae-tiles {tiles}.",
            "Leave it out, or make a larger picture.",
        )
    return tiles


def _budget(request: GenerationRequest) -> int | None:
    """Bytes the process may use. Raises UsageError for unknown amounts and profiles, and both."""
    if request.memory_budget is not None and request.device_profile is not None:
        raise UsageError("--memory-budget and --device-profile exclude each other.", "Give one.")
    if request.device_profile is not None:
        return profile(request.device_profile)
    return None if request.memory_budget is None else parse_bytes(request.memory_budget)
