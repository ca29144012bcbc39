"""What a user can ask for: every option once, with its flags, its type and its help.

The command line, the keywords of the Python API, the metadata inside the file and the table in the
README all follow from the fields of `GenerationRequest`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mlx_sora.errors import UsageError
from mlx_sora.geometry import MAX_LOOPS, MICRO_FRAME_SIZE, Size, parse_frames, resolve_size
from mlx_sora.request import groups as output_options
from mlx_sora.request.modes import (
    GUIDANCE_CACHE,
    GUIDANCE_INTERVAL,
    LPL,
    MAX_STEPS,
    STEP_CACHE,
    TDTM,
)
from mlx_sora.request.options import (
    ImageReference,
    Option,
    VideoReference,
    as_bits,
    as_bool,
    as_float,
    as_frames,
    as_images,
    as_int,
    as_path,
    as_paths,
    as_text,
    as_videos,
    option,
    parallel,
    technique,
    tiles,
)
from mlx_sora.request.presets import PRESETS

SAMPLERS = ("rflow", "midpoint", "ab2")
DTYPES = ("auto", "float32", "bfloat16")
MODELS = ("shapes", "opensora-1.2")

#: Largest values that still mean something; beyond them a typing error is likelier than a wish.
MAX_SEED = 2**63 - 1
MAX_FPS = 240.0


@dataclass(frozen=True)
class GenerationRequest:
    """One video or image. `None` means the model's default; `seed=None` draws one.

    Values are brought to their type on construction (UsageError when that cannot be done);
    `validate()` checks what they mean.
    """

    prompt: str = option(
        "", as_text, "--prompt -p", "what to show; - reads it from stdin", metavar="TEXT"
    )
    model: str | None = option(
        None,
        as_path,
        "--model",
        "shapes, opensora-1.2 (-8bit, -4bit) or a folder; default: opensora-1.2 when downloaded, "
        "else shapes",
        metavar="MODEL",
    )
    seed: int | None = option(
        None,
        as_int,
        "--seed -s",
        "start of the random numbers; default: drawn, printed and recorded",
        metavar="N",
    )
    steps: int | None = option(None, as_int, "--steps", "denoising steps", metavar="N")
    guidance: float | None = option(
        None,
        as_float,
        "--guidance --cfg-scale",
        "how strongly the prompt is followed; 1 turns guidance off and halves the work",
        metavar="SCALE",
    )
    negative_prompt: str | None = option(
        None,
        as_text,
        "--negative-prompt",
        "what to steer away from; default: the empty prompt that the model has learned",
        metavar="TEXT",
    )
    sequential_guidance: bool = option(
        False,
        as_bool,
        "--sequential-guidance",
        "evaluate prompt and no-prompt one after the other: the same video in less memory",
    )
    sampler: str = option(
        "rflow",
        as_text,
        "--sampler",
        "how the flow is followed; midpoint evaluates the network twice per step",
        choices=SAMPLERS,
    )
    resolution: str | None = option(
        None,
        as_text,
        "--resolution",
        "144p to 720p; sets the size with --aspect-ratio",
        metavar="NAME",
        group="size",
    )
    aspect_ratio: str | None = option(
        None, as_text, "--aspect-ratio", "width:height, such as 16:9", metavar="W:H", group="size"
    )
    width: int | None = option(
        None, as_int, "--width", "pixels; give --height too", metavar="N", group="size"
    )
    height: int | None = option(
        None, as_int, "--height", "pixels; give --width too", metavar="N", group="size"
    )
    num_frames: int | str | None = option(
        None,
        as_frames,
        "--num-frames --frames",
        "frames, or a length: 2s 4s 8s 16s; 1 makes an image",
        metavar="N",
        group="size",
    )
    fps: float | None = option(
        None,
        as_float,
        "--fps",
        "frames per second that the model is told and the file plays",
        metavar="N",
        group="size",
    )
    aesthetic: float | None = option(
        None,
        as_float,
        "--aesthetic",
        "aesthetic score added to the prompt, such as 6.5",
        metavar="SCORE",
    )
    motion: float | None = option(
        None, as_float, "--motion", "motion score added to the prompt, such as 10", metavar="SCORE"
    )
    camera: str | None = option(
        None,
        as_text,
        "--camera",
        "camera motion added to the prompt, such as 'pan left'",
        metavar="TEXT",
    )
    images: tuple[ImageReference, ...] = option(
        (),
        as_images,
        "--image",
        "a picture that FRAME shows: a number, negative from the end, first (default) or last; "
        "below STRENGTH 1 it is made anew from that much of it; can be repeated",
        metavar="PATH [FRAME [STRENGTH]]",
        group="conditioning",
        many=True,
    )
    videos: tuple[VideoReference, ...] = option(
        (),
        as_videos,
        "--video",
        "a video that goes on: the new one begins with its last FRAMES (17), or with SIDE after "
        "(default before) ends with its first; one of each connects two; can be repeated",
        metavar="PATH [SIDE [FRAMES [STRENGTH]]]",
        group="conditioning",
        many=True,
    )
    mask_strategy: str | None = option(
        None,
        as_text,
        "",
        "Open-Sora's notation of what is taken from `references`, in latent frames",
        group="conditioning",
    )
    references: tuple[str, ...] = option(
        (), as_paths, "", "pictures and videos of `mask_strategy`", group="conditioning"
    )
    loop: int = option(
        1,
        as_int,
        "--loop",
        "clips of --num-frames in a row, each going on where the one before ends",
        metavar="N",
        group="conditioning",
    )
    condition_frames: int = option(
        MICRO_FRAME_SIZE,
        as_int,
        "--condition-frames",
        "with --loop: frames that a clip takes over from the one before, a multiple of 17",
        metavar="N",
        group="conditioning",
    )
    condition_edit: float = option(
        0.0,
        as_float,
        "--condition-edit",
        "with --loop: how much of them is made anew, 0 to 1",
        metavar="RATIO",
        group="conditioning",
    )
    preset: str | None = option(
        None,
        as_text,
        "--preset",
        "fill the options left open: "
        + "; ".join(f"{name} ({preset.description})" for name, preset in PRESETS.items()),
        choices=tuple(PRESETS),
        group="acceleration",
    )
    lpl: str | None = technique(
        LPL, "--lpl", "leap over the last steps: {forms}; t is flow time, 1000 to 0"
    )
    tdtm: int | str | None = technique(
        TDTM,
        "--tdtm",
        "merge pairs of frames around attention in the first steps: {forms}",
        "STEPS",
    )
    step_cache: str | None = technique(
        STEP_CACHE,
        "--step-cache",
        "run the blocks in some steps only, and add what they added last in the others: {forms}; "
        "tables are made by calibrate; order 1 goes on along a line instead",
    )
    guidance_interval: str | None = technique(
        GUIDANCE_INTERVAL,
        "--guidance-interval",
        "guidance only between two flow times: {forms}",
        "TIMES",
    )
    guidance_cache: str | None = technique(
        GUIDANCE_CACHE,
        "--guidance-cache",
        "after a part of the run, evaluate without prompt in every EACH-th step only: {forms}",
    )
    dtype: str = option("auto", as_text, "--dtype", "number format of the networks", choices=DTYPES)
    quantize: int | None = option(
        None,
        as_bits,
        "--quantize -q",
        "bits per weight while loading, 4 or 8: less memory; convert once to read less, too",
        metavar="BITS",
        group="memory",
    )
    memory_budget: str | None = option(
        None,
        as_text,
        "--memory-budget",
        "bytes the whole process may use, such as 3.3GB; streams and micro-batches to stay in it",
        metavar="BYTES",
        replay=False,
        group="memory",
    )
    device_profile: str | None = option(
        None,
        as_text,
        "--device-profile",
        "the budget of a device, such as iphone-15-pro, ipad-8gb, mac-16gb",
        metavar="NAME",
        replay=False,
        group="memory",
    )
    ci_dl: bool = option(
        False,
        as_bool,
        "--ci-dl",
        "read each block from disk while the one before computes; a budget turns it on",
        replay=False,
        group="memory",
    )
    vae_tiles: int | None = tiles()
    parallel: str = parallel()
    output: str | None = output_options.output()
    overwrite: bool = output_options.overwrite()
    embed_metadata: bool = output_options.embed_metadata()
    metadata: bool = output_options.metadata()
    health_check: bool = output_options.health_check()
    checkpoint_every: int | None = output_options.checkpoint_every()
    preview_every: int | None = output_options.preview_every()

    def __post_init__(self) -> None:
        for name, spec in options().items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, spec.convert(value, label(name)))
            elif name in REQUIRED:
                raise UsageError(f"{name} is missing.", f"Give {label(name)}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationRequest:
        """The inverse of `to_dict`. Unknown names raise UsageError with the nearest known one."""
        known = options()
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"Valid: {', '.join(known)}."
                raise UsageError(f"unknown option {str(name)[:80]!r}.", hint)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every option that differs from its default, and the prompt, as plain JSON values."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name == "prompt" or getattr(self, f.name) != f.default
        }

    def with_seed(self) -> GenerationRequest:
        """This request with a seed: its own, or one drawn from the system's randomness."""
        return self if self.seed is not None else replace(self, seed=drawn_seed())

    def with_preset(self) -> GenerationRequest:
        """Return this request with the options of its preset where it leaves them open."""
        if self.preset is None:
            return self
        values = preset_values(self.preset)
        return replace(
            self, **{name: v for name, v in values.items() if getattr(self, name) in (None, False)}
        )

    def validate(self) -> None:
        """Raise UsageError for a value that no model can serve. Nothing is changed."""
        if not self.prompt.strip():
            raise UsageError(
                "the prompt is empty.", "Give --prompt TEXT (or --prompt - for stdin)."
            )
        _check_range("seed", self.seed, 0, MAX_SEED)
        _check_range("steps", self.steps, 1, MAX_STEPS)
        _check_range("guidance", self.guidance, 0, 100)
        _check_range("checkpoint_every", self.checkpoint_every, 1, MAX_STEPS)
        _check_range("preview_every", self.preview_every, 1, MAX_STEPS)
        _check_range("fps", self.fps, 0.1, MAX_FPS)
        _check_range("loop", self.loop, 1, MAX_LOOPS)
        _check_range("condition_edit", self.condition_edit, 0, 1)
        resolve_size(
            ANY_SIZE,
            resolution=self.resolution,
            aspect_ratio=self.aspect_ratio,
            width=self.width,
            height=self.height,
        )
        if self.num_frames is not None:
            parse_frames(self.num_frames)


#: Stands for the model's own size where only the spelling of a request is checked.
ANY_SIZE = Size(512, 512)

#: Fields that are never None, whatever is asked.
REQUIRED = (
    *("prompt", "sequential_guidance", "sampler", "dtype"),
    *("images", "videos", "references", "loop", "condition_frames", "condition_edit"),
    *("ci_dl", "parallel", "overwrite", "embed_metadata", "metadata", "health_check"),
)


def drawn_seed() -> int:
    """A seed of 32 bits from the system's randomness."""
    return int.from_bytes(os.urandom(4), "big")


def options() -> dict[str, Option]:
    """Field name → Option, in the order of the fields."""
    return {f.name: f.metadata["option"] for f in fields(GenerationRequest)}


def preset_values(name: str) -> dict[str, Any]:
    """Return the options that preset `name` decides: its own, and every other technique as off."""
    techniques = (name for name, option in options().items() if option.group == "acceleration")
    off = dict.fromkeys((technique for technique in techniques if technique != "preset"), "off")
    return off | dict(PRESETS[name].values)


def label(name: str) -> str:
    """How an error names an option: its first flag, or the keyword where it has none."""
    flags = options()[name].flags
    return flags[0] if flags else name


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        given = str(value)[:40]
        raise UsageError(f"{label(name)} {given} is out of range.", f"Give {low} to {high}.")
