"""A request with every open option decided: what the pipeline really runs.

The request stays as the user gave it; the model's defaults fill what it leaves open. Whatever is
not taken literally becomes a warning, which the progress line and the metadata both show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mlx_sora.conditioning.clips import Clips
from mlx_sora.conditioning.media import Media, frames_by_latent, plan_media
from mlx_sora.errors import UsageError, shell_words
from mlx_sora.geometry import (
    MAX_LOOPS,
    Geometry,
    ModelArguments,
    Size,
    check_tiles,
    latent_frames,
    model_arguments,
    parse_frames,
    plan_geometry,
    resolve_size,
)
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.memory.budget import resolve_budget
from mlx_sora.request.generation import GenerationRequest, technique_names
from mlx_sora.request.techniques import OFF, TechniqueConfig
from mlx_sora.sampling.noise import SecondPass
from mlx_sora.sampling.windows import Windows
from mlx_sora.text.cleaning import preprocess
from mlx_sora.text.prompt import (
    SCORE_PHRASES,
    Prompt,
    Scores,
    Segment,
    first_loops,
    prepare_prompt,
)

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_sora.sampling.base import Sampler

#: Names of texts in messages.
NEGATIVE, SOURCE = "the negative prompt", "the source prompt"


@dataclass(frozen=True)
class ResolvedRequest:
    """A request with every option decided.

    texts: the prompt as T5 gets it, scored and cleaned, for each clip, or for each window of the
    only one. segments: of such a text, if it has several, over all frames of a clip; T5 gets these.
    negative: the cleaned negative prompt. subjects: cleaned texts without scores, by their names in
    messages. geometry: sizes and latent shape of a clip or window. media: conditioning of the
    clips. windows: of the only clip, or None. fps: of the finished file.
    accelerations: configs by option. memory_budget: bytes of the whole process, or None.
    vae_tiles: tiles in a row, 1 for none. warnings: what is not taken literally. second_pass: if
    this is the second of two passes.
    """

    model: str
    texts: tuple[str, ...]
    negative: str | None
    subjects: Mapping[str, str]
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
    accelerations: Mapping[str, TechniqueConfig | None]
    memory_budget: int | None
    vae_tiles: int
    windows: Windows | None = None
    segments: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    second_pass: SecondPass | None = None

    @property
    def first_step(self) -> int:
        """Index of the first step to make, of `steps`."""
        return 0 if self.second_pass is None else self.second_pass.first_step

    @property
    def steps_to_make(self) -> int:
        """Number of steps from `first_step` on."""
        return self.steps - self.first_step

    @property
    def noise_level(self) -> float:
        """Share of noise at the start."""
        return 1.0 if self.second_pass is None else self.second_pass.strength

    def starting_times(self, sampler: Sampler) -> mx.array:
        """Return the flow times of the sampler, float32 [N + 1, 1].

        A second pass begins at a time of its own.
        """
        times = sampler.timesteps(self.steps, **self.model_args.sizes)
        if self.second_pass is not None:
            times[self.first_step] = self.second_pass.start
        return times

    @property
    def techniques(self) -> Mapping[str, TechniqueConfig | None]:
        """Accelerations of this pass.

        A second pass leaps only at a flow time: other rules count from the first step.
        """
        lpl = self.accelerations.get("lpl")
        if self.second_pass is None or lpl is None or lpl.mode == "t":
            return self.accelerations
        return {**self.accelerations, "lpl": None}

    @property
    def window_count(self) -> int:
        """Windows of the video; 1 without."""
        return 1 if self.windows is None else self.windows.count

    @property
    def latent(self) -> tuple[int, int, int]:
        """Latents (T, H, W) that are denoised together."""
        return latent_frames(self.clips.num_frames), *self.geometry.latent[1:]

    @property
    def text(self) -> str:
        """Text of the first clip."""
        return self.texts[0]

    @property
    def clips(self) -> Clips:
        """Clips of the video."""
        return self.media.clips

    @property
    def all_texts(self) -> list[str]:
        """Every text to encode, once."""
        negative = [] if self.negative is None else [self.negative]
        own = [part for text in self.texts for part in self._parts(text)]
        return list(dict.fromkeys([*own, *negative]))

    def most_tokens(self, lengths: Mapping[str, int]) -> int:
        """Return the most tokens that a clip attends to; `lengths`: tokens of each text."""
        least = 0 if self.negative is None else lengths[self.negative]
        clips = [[max(least, lengths[part]) for part in self._parts(text)] for text in self.texts]
        return max(map(sum, clips))

    def _parts(self, text: str) -> list[str]:
        return [part.text for part in self.segments.get(text, ())] or [text]

    @property
    def scores(self) -> Scores:
        """Scores appended to every prompt."""
        return Scores(self.aesthetic, self.motion, self.camera)

    @property
    def model_args(self) -> ModelArguments:
        """Sizes and frame rate that condition the networks."""
        return model_arguments(self.geometry.size, self.geometry.num_frames, self.fps)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for the metadata."""
        left_out = {"texts", "negative", "subjects", "geometry", "media", "accelerations"}
        left_out |= {"segments", "windows", "warnings", "second_pass"}
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        modes = {name: str(config or OFF) for name, config in self.accelerations.items()}
        record |= {"text": self.text, **modes}
        width, height = self.geometry.size
        record |= {"width": width, "height": height, "num_frames": self.geometry.num_frames}
        if self.second_pass is not None:
            first = self.second_pass.first_size  # as the options have it
            record |= {"width": first.width, "height": first.height}
            record |= {"refine": f"{width}x{height}", "refine_strength": self.second_pass.strength}
            record["refine_steps"] = self.steps_to_make
        if len(set(self.texts)) > 1:
            record["scenes"] = list(self.texts)
        if self.negative is not None:
            record["negative_text"] = self.negative
        if self.media.files:
            record["media"] = self.media.to_metadata()
        return record


def resolve(
    request: GenerationRequest, model: ModelFolder, *, loops: bool = True
) -> ResolvedRequest:
    """Decide every option of a validated request that has a seed. loops: it may have clips.

    Raises UsageError for sizes, lengths and media that no model can make.
    """
    assert request.seed is not None, "call request.with_seed() first"

    def value(name: str) -> Any:
        own = getattr(request, name)
        return getattr(model.defaults, name) if own is None else own

    geometry, warnings = _resolve_geometry(request, model)
    clips = Clips(geometry.num_frames, request.loop, request.condition_frames)
    clips.check()
    scores = Scores(value("aesthetic"), request.motion, request.camera)
    prompt = prepare_prompt(request.prompt, scores)
    texts, segments = _texts(prompt, clips)
    windows = _windows(request, clips, texts, segmented=bool(segments))
    shown = clips if windows is None else Clips(clips.total)
    if request.refine is None and request.refine_strength is not None:
        warnings.append("--refine-strength has no effect without --refine.")
    media = plan_media(request, prompt.directives, shown, geometry.size, value("fps"))
    negative = None if request.negative_prompt is None else preprocess(request.negative_prompt)
    warnings += [*_overruled(request, prompt), *_unused_blending(request, windows, texts)]
    warnings += _ineffective_image_guidance(request.image_guidance, media, value("guidance"))
    warnings += [*media.warnings, *_unused_scenes(prompt, clips, loops=loops)]
    warnings += _unused_segments(prompt, clips)
    if negative is not None and value("guidance") == 1:
        warnings.append("--negative-prompt has no effect without guidance.")
    return ResolvedRequest(
        model=model.name,
        texts=texts,
        segments=segments,
        negative=negative,
        subjects=_subjects(prompt, negative, clips.count),
        seed=request.seed,
        steps=value("steps"),
        guidance=value("guidance"),
        sampler=request.sampler,
        geometry=geometry,
        media=media,
        fps=value("fps"),
        aesthetic=scores.aesthetic,
        motion=scores.motion,
        camera=scores.camera,
        accelerations={name: getattr(request, name) for name in technique_names()},
        memory_budget=resolve_budget(request.memory_budget, request.device_profile),
        vae_tiles=check_tiles(request.vae_tiles or 1, geometry),
        windows=windows,
        warnings=tuple(warnings),
    )


def _resolve_geometry(request: GenerationRequest, model: ModelFolder) -> tuple[Geometry, list[str]]:
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
    return geometry, warnings


def _windows(
    request: GenerationRequest, clips: Clips, texts: Sequence[str], *, segmented: bool
) -> Windows | None:
    """Return the windows with these texts, or None if the clips are made one after another.

    Raises UsageError for scenes that would blend where their windows do not overlap, and for texts
    with segments.
    """
    if request.long != "windows":
        return None
    if segmented and clips.count > 1:
        raise UsageError(
            "--long windows takes no ranges of frames in the prompt.",
            "Give each window a scene: |0|first text|1|second text.",
        )
    shared = clips.shared_frames
    blend = shared if request.scene_blend is None else request.scene_blend
    if clips.count > 1 and blend > shared:
        raise UsageError(
            f"--scene-blend {blend} is more than windows share: --condition-frames {shared}.",
            f"Give --scene-blend {shared} or less.",
        )
    overlap, length = clips.shared_latents, latent_frames(clips.num_frames)
    ramps = (overlap if a == b else overlap * blend / shared for a, b in pairwise(texts))
    return Windows(length, length - overlap, tuple(ramps))


def _unused_blending(
    request: GenerationRequest, windows: Windows | None, texts: Sequence[str]
) -> Iterator[str]:
    """Yield a warning for each option of the other way to make a long video."""
    if windows is not None and windows.count > 1 and request.condition_edit:
        yield "--condition-edit has no effect with --long windows: no frames are taken over."
    if request.scene_blend is not None and (windows is None or len(set(texts)) == 1):
        yield "--scene-blend has no effect: it is for several scenes with --long windows."


def _subjects(prompt: Prompt, negative: str | None, clips: int) -> dict[str, str]:
    subjects = dict[str, str]()
    for number, (scene, parts) in enumerate(zip(prompt.scenes, prompt.parts(), strict=True), 1):
        name = f"scene {number} of the prompt" if len(prompt.scenes) > 1 else "the prompt"
        if scene.start < clips:
            for part in parts:
                own = f"[{part.start}-{part.stop}] of " if part.stop else ""
                subjects[own + name] = part.subject
    return subjects if negative is None else subjects | {NEGATIVE: negative}


def _overruled(request: GenerationRequest, prompt: Prompt) -> Iterator[str]:
    """Yield a warning for each option that the prompt itself decides otherwise."""
    for name, phrase in SCORE_PHRASES.items():
        parts = [part for parts in prompt.parts() for part in parts]
        own = any(phrase in part.subject and part.text.count(phrase) == 1 for part in parts)
        if own and getattr(request, name) is not None:
            value = shell_words(getattr(request, name))
            yield f"--{name} {value} is not used: the prompt has its own '{phrase}'."
    if prompt.directives.references not in (None, request.references) and request.references:
        yield "`references` are not used: the prompt has its own reference_path."
    if prompt.directives.mask_strategy is not None and request.mask_strategy is not None:
        yield "`mask_strategy` is not used: the prompt has its own."


def _ineffective_image_guidance(mode: str, media: Media, guidance: float) -> Iterator[str]:
    """Yield a warning if `mode` of --image-guidance changes nothing."""
    masks = (media.mask(clip) for clip in range(media.clips.count))
    missing = "guidance" if mode == "joint" and guidance == 1 else ""
    if all(level == 1 for mask in masks for level in mask):
        missing = "an image, a video or a loop"
    if mode != "clean" and missing:
        yield f"--image-guidance {mode} has no effect without {missing}."


def _unused_scenes(prompt: Prompt, clips: Clips, *, loops: bool) -> Iterator[str]:
    """Yield a warning for scenes that are ignored. loops: there may be more clips."""
    begins = [loop for loop in first_loops(prompt.scenes) if loop is not None]
    used = sum(loop < clips.count for loop in begins)
    if used == len(prompt.scenes):
        return
    only = "only the first is" if used == 1 else f"only {used} are"
    needed, possible = begins[-1] + 1, loops and clips.num_frames > 1
    hint = f" Give {replace(clips, count=needed).hint()} to make more."
    more = possible and clips.count < needed <= MAX_LOOPS
    yield f"The prompt has {len(prompt.scenes)} scenes; {only} made.{hint if more else ''}"


def _texts(prompt: Prompt, clips: Clips) -> tuple[tuple[str, ...], dict[str, tuple[Segment, ...]]]:
    """Return the text of each clip, and the segments of texts that have several.

    They end where the clip ends. A text with one segment is an ordinary text.
    """
    texts, segments = list[str](), dict[str, tuple[Segment, ...]]()
    for text in map(prompt.text, range(clips.count)):
        parts = [part for part in prompt.segments.get(text, ()) if part.start < clips.num_frames]
        if len(parts) > 1:
            segments[text] = (*parts[:-1], replace(parts[-1], stop=clips.num_frames))
        texts.append(parts[0].text if len(parts) == 1 else text)
    return tuple(texts), segments


def latent_shares(
    segments: Sequence[Segment], num_frames: int, blend: int = 0
) -> tuple[tuple[float, ...], ...]:
    """Return the share of each segment in the frames of each latent frame, T x K.

    blend: frames over which one goes over into the next.
    """

    def ramp(at: int, frame: int) -> float:
        if blend and at > 0:
            return min(max((frame + 0.5 - at) / blend + 0.5, 0.0), 1.0)
        return float(frame >= at)

    starts = [part.start for part in segments]
    rows = []
    for frames in frames_by_latent(num_frames):
        sums = [*(sum(ramp(at, frame) for frame in frames) for at in starts), 0.0]
        rows.append(tuple((here - later) / len(frames) for here, later in pairwise(sums)))
    return tuple(rows)


def _unused_segments(prompt: Prompt, clips: Clips) -> Iterator[str]:
    """Yield a warning for segments that do not end where the clips end."""
    texts = dict.fromkeys(map(prompt.text, range(clips.count)))
    for parts in filter(None, map(prompt.segments.get, texts)):
        stop = parts[-1].stop
        if stop > clips.num_frames:
            yield f"The prompt describes {stop} frames, but a clip has {clips.num_frames}."
        elif stop < clips.num_frames:
            yield f"[{parts[-1].start}-{stop}] of the prompt goes on to frame {clips.num_frames}."
