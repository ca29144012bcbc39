"""Keywords of `Pipeline`, typed for editors and type checkers.

Generated from the fields of the requests: python -m tests.invariants.readme
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import TypeAlias

    import numpy as np
    from PIL import Image

    from mlx_sora.request.techniques import GuidanceCache, GuidanceInterval, Lpl, StepCache, Tdtm
    from mlx_sora.video import Video

    FilePath: TypeAlias = str | os.PathLike[str]

    #: A file, a PIL image, pixels [H, W, 3] (uint8, or floats 0 to 1), or a `Video` of one frame.
    Picture: TypeAlias = FilePath | Image.Image | np.ndarray | Video

    #: A file, a `Video`, pixels [F, H, W, 3], or a list of pictures.
    Footage: TypeAlias = FilePath | Video | np.ndarray | Sequence[Image.Image | np.ndarray]

    #: Each picture stands by itself or in (picture, frame, strength); frames are numbers, first or
    #: last.
    Pictures: TypeAlias = Picture | Sequence[Picture | Sequence[Any]]

    #: Each video stands by itself or in (video, before or after, frames to use, strength).
    Footages: TypeAlias = Footage | Sequence[Footage | Sequence[Any]]


class SharedKeywords(TypedDict, total=False):
    """Options of generations and edits."""

    model: FilePath | None
    steps: int | None
    guidance: float | None
    negative_prompt: str | None
    sequential_guidance: bool
    sampler: Literal["rflow", "midpoint", "ab2"]
    resolution: str | None
    aspect_ratio: str | None
    width: int | None
    height: int | None
    num_frames: int | str | None
    fps: float | None
    aesthetic: float | None
    motion: float | None
    camera: str | None
    lpl: Lpl | str | None
    tdtm: Tdtm | int | str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    vae_dtype: Literal["float32", "bfloat16", "float16"]
    quantize: int | str | None
    memory_budget: str | int | None
    device_profile: str | None
    ci_dl: bool
    vae_tiles: int | None
    text_cache: bool
    parallel: Literal["auto", "guidance", "sequence", "both", "windows", "prompts", "off"]
    output: FilePath | None
    overwrite: bool
    scale: int
    embed_metadata: bool
    metadata: bool
    health_check: bool


class GenerationKeywords(SharedKeywords, total=False):
    """Options of `GenerationRequest`, but for the prompt."""

    seed: int | None
    refine: str | None
    refine_strength: float | None
    original_prompt: str | None
    images: Pictures
    videos: Footages
    image_guidance: Literal["clean", "joint", "noised"]
    mask_strategy: str | None
    references: FilePath | Sequence[FilePath]
    loop: int
    condition_frames: int
    condition_edit: float
    long: Literal["clips", "windows"]
    scene_blend: int | None
    preset: Literal["exact", "balanced", "fast", "tiny-ram"] | None
    step_cache: StepCache | str | None
    guidance_interval: GuidanceInterval | str | None
    guidance_cache: GuidanceCache | str | None
    checkpoint_every: int | None
    preview_every: int | None
    keep_previews: bool


class EditKeywords(SharedKeywords, total=False):
    """Options of `EditRequest`, but for the video and both prompts."""

    inject_steps: int | None


class ReconstructionKeywords(TypedDict, total=False):
    """Options of a reconstruction."""

    model: FilePath | None
    resolution: str | None
    aspect_ratio: str | None
    width: int | None
    height: int | None
    num_frames: int | str | None
    vae_dtype: Literal["float32", "bfloat16", "float16"]
    memory_budget: str | int | None
    device_profile: str | None
    vae_tiles: int | None
    output: FilePath | None
    overwrite: bool
    embed_metadata: bool
