"""GenerationRequest: every option of a video, once.

The flags of the command line, the keywords of the Python API, the metadata inside a file and the
tables of the READMEs all follow from these fields.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

from mlx_sora.errors import MlxSoraError, UsageError
from mlx_sora.geometry import (
    MAX_FRAMES,
    MAX_LOOPS,
    MAX_TILES,
    MICRO_FRAME_SIZE,
    Size,
    parse_frames,
    resolve_size,
)
from mlx_sora.request.options import (
    ImageReference,
    Option,
    VideoReference,
    as_amount,
    as_dtype,
    as_frames,
    as_images,
    as_path,
    as_paths,
    as_quantization,
    as_size,
    as_tiles,
    as_videos,
    option,
)
from mlx_sora.request.presets import PRESETS
from mlx_sora.request.techniques import (
    MAX_STEPS,
    OFF,
    SITES,
    GuidanceCache,
    GuidanceInterval,
    Lpl,
    StepCache,
    Tdtm,
    TechniqueConfig,
)
from mlx_sora.request.words import in_keywords

#: Samplers by name: module and class, so that naming one does not load MLX. `mlx_sora.sampling`
#: makes them.
SAMPLERS = {
    "rflow": "mlx_sora.sampling.rflow:RFlow",
    "midpoint": "mlx_sora.sampling.midpoint:Midpoint",
    "ab2": "mlx_sora.sampling.ab2:AdamsBashforth",
}

#: Data types of weights and activations. auto follows the device.
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
DTYPES = ("auto", *FLOAT_DTYPES)

#: How predictions see the frames of given images, videos and clips; sampling/guidance.py.
IMAGE_GUIDANCE = ("clean", "joint", "noised")

#: How ranks split a video; see mlx_sora/distributed/partition.py.
PARALLEL_MODES = ("auto", "guidance", "sequence", "both", "windows", "prompts", "off")

#: How the clips of a long video are made.
LONG_MODES = ("clips", "windows")

#: Largest values that make sense. Beyond them a typing error is likelier.
MAX_SEED = 2**63 - 1
MAX_FPS = 240.0
MAX_SCALE = 64

#: Share of noise at which a second pass begins.
REFINE_STRENGTH = 0.6

#: Commands that make videos, and these together with `calibrate`.
_VIDEO = "generate edit bench"
_ALL = "generate edit bench calibrate"
_VAE = "generate edit bench reconstruct"

_size = partial(option, tasks=f"{_ALL} reconstruct", group="size", common=True)
_conditioning = partial(option, group="conditioning")
_memory = partial(option, group="memory")
_output = partial(option, replay=False, group="output")


@contextmanager
def keyword_errors() -> Iterator[None]:
    """Let errors of the block, or of the decorated function, speak of keywords instead of flags.

    For the Python API; the command line prints `flag_text` of the same errors.
    """
    try:
        yield
    except MlxSoraError as error:
        to_keywords(error)
        raise


def to_keywords(error: MlxSoraError) -> None:
    """Put keywords in the place of the flags in an error."""
    error.reword(partial(in_keywords, options=options()))


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One video or image. `None` stands for the default of the model, or for a random seed.

    The constructor converts values to the types of the fields and raises UsageError if it cannot.
    `validate()` checks what the values mean.
    """

    prompt: str = option(
        "text prompt; - reads it from standard input",
        "",
        tasks=_VIDEO,
        aliases="-p",
        metavar="TEXT",
        common=True,
    )
    model: str | None = option(
        "shapes, opensora-1.2 (-8bit, -4bit) or a model folder; default: opensora-1.2 if it is "
        "downloaded, else shapes",
        tasks=f"{_ALL} reconstruct",
        parse=as_path,
        metavar="MODEL",
        common=True,
    )
    seed: int | None = option(
        "random seed; default: a random one, which is printed and recorded",
        tasks="generate",
        aliases="-s",
        low=0,
        high=MAX_SEED,
        fix=f"Give 0 to {MAX_SEED}, or leave it out for a random one.",
        common=True,
    )
    steps: int | None = option(
        "number of denoising steps", tasks=_ALL, low=1, high=MAX_STEPS, common=True
    )
    guidance: float | None = option(
        "classifier-free guidance scale: a higher one follows the prompt more closely; 1 turns "
        "guidance off and halves the work",
        tasks=_ALL,
        aliases="--guidance-scale --cfg-scale",
        metavar="SCALE",
        low=0,
        high=100,
        common=True,
    )
    negative_prompt: str | None = option(
        "what the video should not show; default: the empty prompt that the model has learned",
        tasks=_VIDEO,
        metavar="TEXT",
        common=True,
    )
    sequential_guidance: bool = option(
        "compute the conditional and the unconditional prediction one after the other: the same "
        "video in less memory",
        False,
        tasks=_VIDEO,
    )
    sampler: str = option(
        "solver of the flow ODE; midpoint calls the network twice per step",
        "rflow",
        tasks=_VIDEO,
        choices=tuple(SAMPLERS),
    )

    resolution: str | None = _size(
        "144p to 720p; sets the size together with --aspect-ratio", metavar="NAME"
    )
    aspect_ratio: str | None = _size("width:height, such as 16:9", metavar="W:H")
    width: int | None = _size("width in pixels; needs --height")
    height: int | None = _size("height in pixels; needs --width")
    num_frames: int | str | None = _size(
        "number of frames, or a length: 2s 4s 8s 16s; 1 makes an image",
        aliases="--frames",
        parse=as_frames,
        metavar="N",
    )
    refine: str | None = _size(
        "two passes: make the video at the size above, enlarge it to SIZE (144p to 720p, or "
        "WIDTHxHEIGHT), add noise, and make the rest of the steps at that size",
        tasks="generate bench",
        parse=as_size,
        common=False,
        metavar="SIZE",
    )
    refine_strength: float | None = _size(
        "with --refine: share of noise in the second pass, 0 (only enlarge) to 1 (begin anew); "
        f"default: {REFINE_STRENGTH}",
        tasks="generate bench",
        common=False,
        metavar="SHARE",
        low=0,
        high=1,
    )
    fps: float | None = _size(
        "frames per second of the file, which also conditions the model",
        tasks=_ALL,
        metavar="N",
        low=0.1,
        high=MAX_FPS,
    )

    aesthetic: float | None = option(
        "aesthetic score appended to the prompt, such as 6.5", tasks=_VIDEO, metavar="SCORE"
    )
    motion: float | None = option(
        "motion score appended to the prompt, such as 10", tasks=_VIDEO, metavar="SCORE"
    )
    camera: str | None = option(
        "camera motion appended to the prompt, such as 'pan left'", tasks=_VIDEO, metavar="TEXT"
    )

    original_prompt: str | None = option(
        "prompt before it was enhanced; recorded only", python_only=True
    )

    images: tuple[ImageReference, ...] = _conditioning(
        "image to show in FRAME: a number (negative: from the end), first (default) or last; "
        "STRENGTH 1 (default) keeps the image as it is, less lets denoising change it; can be "
        "repeated",
        (),
        parse=as_images,
        metavar="PATH [FRAME [STRENGTH]]",
        many=True,
        common=True,
    )
    videos: tuple[VideoReference, ...] = _conditioning(
        "video to continue: the new one begins with its last FRAMES (default 17) frames; with SIDE "
        "after (default before) it ends with its first ones; one of each connects two videos; can "
        "be repeated",
        (),
        parse=as_videos,
        metavar="PATH [SIDE [FRAMES [STRENGTH]]]",
        many=True,
        common=True,
    )
    image_guidance: str = _conditioning(
        "how denoising sees the frames of --image, --video and --loop: clean, as they are; noised "
        "as far as the rest of the video; joint (STIV), clean with the prompt and noised without "
        "it, so that guidance also moves towards them",
        "clean",
        choices=IMAGE_GUIDANCE,
    )
    mask_strategy: str | None = _conditioning(
        "Open-Sora's mask strategy: what to take from `references`, in latent frames",
        python_only=True,
    )
    references: tuple[str, ...] = _conditioning(
        "images and videos for `mask_strategy`", (), parse=as_paths, python_only=True
    )
    loop: int = _conditioning(
        "number of clips of --num-frames frames; each continues the one before",
        1,
        low=1,
        high=MAX_LOOPS,
    )
    condition_frames: int = _conditioning(
        "with --loop: frames that a clip takes over from the one before, a multiple of 17",
        MICRO_FRAME_SIZE,
    )
    condition_edit: float = _conditioning(
        "with --loop: how much denoising may change these frames, 0 (nothing) to 1",
        0.0,
        metavar="RATIO",
        low=0,
        high=1,
    )
    long: str = _conditioning(
        "with --loop: make the clips one after another, or all frames together in windows of "
        "--num-frames frames that overlap by --condition-frames and blend there",
        LONG_MODES[0],
        choices=LONG_MODES,
    )
    scene_blend: int | None = _conditioning(
        "with --long windows: frames over which a scene of the prompt blends into the next, 0 for "
        "a cut; default: all that their windows share",
        low=0,
        high=MAX_FRAMES,
    )

    preset: str | None = option(
        "fill in the options that are not given: "
        + "; ".join(f"{name} ({preset.description})" for name, preset in PRESETS.items()),
        choices=tuple(PRESETS),
        common=True,
        group="acceleration",
    )
    lpl: Lpl | str | None = option(
        "Linear Proportional Leap: replace the last steps by one leap to t = 0: "
        f"{Lpl.forms()}; TIME is flow time, 1000 to 0; order=1 extrapolates the velocity",
        tasks=_VIDEO,
        parse=Lpl.parse,
        metavar="MODE",
        group="acceleration",
    )
    tdtm: Tdtm | int | str | None = option(
        "Temporal Dimension Token Merging: merge pairs of frames around attention in the first "
        f"steps, the last, those at some flow times, or what calibrate chose for a speed: "
        f"{Tdtm.forms()}; sites: {'+'.join(SITES)}",
        tasks=_VIDEO,
        parse=Tdtm.parse,
        metavar="STEPS",
        group="acceleration",
    )
    step_cache: StepCache | str | None = option(
        "skip the transformer blocks in most steps and reuse their cached residual: "
        f"{StepCache.forms()}; calibrate makes the tables; order=1 extrapolates from the last two "
        "residuals",
        parse=StepCache.parse,
        metavar="MODE",
        group="acceleration",
    )
    guidance_interval: GuidanceInterval | str | None = option(
        f"apply guidance only between two flow times: {GuidanceInterval.forms()}",
        parse=GuidanceInterval.parse,
        metavar="TIMES",
        group="acceleration",
    )
    guidance_cache: GuidanceCache | str | None = option(
        "after 1/3 of the run, compute the unconditional prediction every EACH steps and reuse it "
        f"in between: {GuidanceCache.forms()}",
        parse=GuidanceCache.parse,
        metavar="MODE",
        group="acceleration",
    )

    dtype: str = option(
        "data type of weights and activations; auto: bfloat16 on GPUs, float32 on CPUs; float16 is "
        "faster on M1 and M2, which emulate bfloat16, and for the transformer only: T5 overflows",
        "auto",
        tasks=_ALL,
        parse=as_dtype,
        choices=DTYPES,
    )
    vae_dtype: str = _memory(
        "data type of the VAE, on GPUs: half precision takes less memory, and pictures differ by "
        "53 dB in bfloat16 and 65 dB in float16 (shapes); SDXL's VAE, which opensora-1.2 has, may "
        "overflow in float16",
        "float32",
        tasks=_VAE,
        parse=as_dtype,
        choices=FLOAT_DTYPES,
    )
    quantize: int | str | None = _memory(
        "quantize the weights while loading, which saves memory: to 3, 4, 5, 6 or 8 bits, mxfp4, "
        "nvfp4, mxfp8, mixed:BITS (an average; needs calibrate --bits), or each network "
        "(t5=4,transformer=8); convert does it once and also saves reading",
        tasks=_VIDEO,
        aliases="-q",
        parse=as_quantization,
        metavar="BITS",
        common=True,
    )
    memory_budget: str | None = _memory(
        "most memory that the process may use: an amount such as 3.3GB, auto (90 percent of what "
        "the GPU may use, or what is available now) or off; streams weights and decodes fewer "
        "frames at a time to stay within it; default: auto on GPUs, off on CPUs",
        tasks="generate edit calibrate reconstruct",
        parse=as_amount,
        metavar="BYTES",
        replay=False,
        common=True,
    )
    device_profile: str | None = _memory(
        "memory budget of a device, such as iphone-15-pro, ipad-8gb, mac-16gb",
        tasks="generate edit calibrate reconstruct",
        metavar="NAME",
        replay=False,
    )
    ci_dl: bool = _memory(
        "Concurrent Inference with Dynamic Loading: read each block from disk while the one before "
        "computes, and keep none; a memory budget does so with the blocks that do not fit",
        False,
        tasks="generate edit calibrate",
        replay=False,
    )
    vae_tiles: int | None = _memory(
        f"decode frames in N x N overlapping, blended tiles, 2 to {MAX_TILES}: an approximation, "
        "for large frames in little memory; 1 is off",
        tasks=_VAE,
        parse=as_tiles,
        metavar="N",
    )
    text_cache: bool = _memory(
        "store T5's states of each prompt in the cache folder; its next video then reads no T5",
        True,
        tasks="generate edit",
        replay=False,
    )
    parallel: str = _memory(
        "with mlx.launch, what the ranks split: the two predictions of guidance, the sequence of "
        "tokens, both, the windows of --long windows, or the prompts of --prompt-file; off is for "
        "a single process",
        "auto",
        tasks=_VIDEO,
        choices=PARALLEL_MODES,
        replay=False,
    )

    output: str | None = _output(
        "mp4, mov, webm, gif, webp or png; name_%04d.png or FOLDER/ writes one png per frame; "
        "{seed} {index} {prompt_slug} {model} {date} are filled in; missing folders are made",
        tasks="generate edit reconstruct",
        aliases="-o",
        parse=as_path,
        metavar="FILE",
        common=True,
    )
    overwrite: bool = _output(
        "replace an existing output", False, tasks="generate edit reconstruct", common=True
    )
    scale: int = _output(
        "enlarge what is written N times, each pixel to N x N equal ones, to look at small videos",
        1,
        tasks="generate edit",
        low=1,
        high=MAX_SCALE,
        replay=True,
        common=True,
    )
    embed_metadata: bool = _output(
        "record the request inside the file", True, tasks="generate edit reconstruct"
    )
    metadata: bool = _output(
        "also write the metadata as JSON beside the output", False, tasks="generate edit"
    )
    health_check: bool = _output(
        "stop at NaN, exploding, flat, black or static results", True, tasks=_VIDEO
    )
    checkpoint_every: int | None = _output(
        "save OUTPUT.checkpoint.safetensors every N steps and at an interrupt; the same command, "
        "or --resume, continues from it; a finished video removes it",
        low=1,
        high=MAX_STEPS,
    )
    preview_every: int | None = _output(
        "every N steps, write the expected video to NAME.preview.gif (.png for an image) beside "
        "NAME.mp4; removed when the run ends",
        low=1,
        high=MAX_STEPS,
    )
    keep_previews: bool = _output("keep each preview, as NAME.preview.step-N.gif", False)

    @keyword_errors()
    def __post_init__(self) -> None:
        for name, spec in options().items():
            value = getattr(self, name)
            if value is not spec.default:  # which needs no conversion; a batch makes many requests
                object.__setattr__(self, name, spec.convert(value))

    @classmethod
    @keyword_errors()
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationRequest:
        """Return the request of `to_dict`. Raises UsageError for an unknown option."""
        known = options()
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"Valid: {', '.join(known)}."
                raise UsageError(f"unknown option {str(name)[:80]!r}.", hint)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the prompt and every option that differs from its default, as JSON values."""
        values = {
            name: getattr(self, name)
            for name, spec in options().items()
            if name == "prompt" or getattr(self, name) != spec.default
        }
        return {n: str(v) if isinstance(v, TechniqueConfig) else v for n, v in values.items()}

    def with_seed(self, seed: int | None = None) -> GenerationRequest:
        """Return this request with its own seed, else with `seed`, else with 32 random bits."""
        if self.seed is not None:
            return self
        return replace(self, seed=int.from_bytes(os.urandom(4), "big") if seed is None else seed)

    def with_preset(self) -> GenerationRequest:
        """Return this request with the options of its preset where it leaves them open."""
        if self.preset is None:
            return self
        values = preset_values(self.preset).items()
        return replace(self, **{n: v for n, v in values if getattr(self, n) in (None, False)})

    def preset_sources(self) -> dict[str, str]:
        """Return the name of the preset for each option that it fills in."""
        values = PRESETS[self.preset].values if self.preset is not None else {}
        return {n: f"--preset {self.preset}" for n in values if getattr(self, n) in (None, False)}

    @keyword_errors()
    def validate(self) -> None:
        """Raise UsageError for a value that no model supports."""
        if not self.prompt.strip():
            raise UsageError("the prompt is empty.", "Give --prompt TEXT.")
        for name, spec in options().items():
            spec.check_range(getattr(self, name))
        resolve_size(
            ANY_SIZE,
            resolution=self.resolution,
            aspect_ratio=self.aspect_ratio,
            width=self.width,
            height=self.height,
        )
        if self.num_frames is not None:
            parse_frames(self.num_frames)


#: Takes the place of the model's own size when a request is checked without a model.
ANY_SIZE = Size(512, 512)


@cache
def options() -> dict[str, Option]:
    """Return the options by field name, in the order of the fields."""
    return {f.name: Option.from_field(f) for f in fields(GenerationRequest)}


def options_of(task: str) -> dict[str, Option]:
    """Return the options that a command offers, such as generate, edit, calibrate or bench."""
    return {name: spec for name, spec in options().items() if task in spec.tasks}


def label(name: str) -> str:
    """Return the name of an option in messages: its first flag, or the keyword if it has none."""
    return options()[name].label


def technique_names() -> list[str]:
    """Return the options that configure a technique."""
    accelerations = [name for name, spec in options().items() if spec.group == "acceleration"]
    return [name for name in accelerations if name != "preset"]


def preset_values(name: str) -> dict[str, Any]:
    """Return the options that preset `name` decides: its own, and every other technique as off."""
    return dict.fromkeys(technique_names(), OFF) | dict(PRESETS[name].values)


def with_sources(text: str, sources: Mapping[str, str]) -> str:
    """Return a sentence with the sources of the options that it names. sources: by option."""
    found = [
        f"{label(name)} is from {source}"
        for name, source in sources.items()
        if name in options() and re.search(rf"(?<![\w-]){re.escape(label(name))}(?![\w-])", text)
    ]
    return f"{text.rstrip('.')} ({'; '.join(found)})." if found else text


def to_command_line(values: Mapping[str, Any]) -> list[str]:
    """Return the command line that stands for these values, as `to_dict` returns them."""
    words = []
    for name, value in values.items():
        flag = options()[name].flags[0]
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif options()[name].many:
            words += [word for item in value for word in (flag, *map(str, item))]
        else:
            words.append(f"{flag}={value}")
    return words
