"""Media of a request: which frames of which images and videos condition which clips.

Decided from file headers; no pixels are read. An image or video is assigned to frames of a clip
and conditions the latent frames of those. These are encoded together with repeated frames around
them, because a frame that is alone in its chunk of the VAE comes out differently (its norms see
padding).

References with a mask strategy are Open-Sora's own form. Each is encoded by itself, and its latent
frames are copied to where the strategy says, at the starts of chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_sora.conditioning.clips import Clips
from mlx_sora.conditioning.mask_strategy import (
    LatentSpan,
    MaskGroup,
    append_generated,
    parse_mask_strategy,
    resolve_mask_strategy,
)
from mlx_sora.errors import UsageError, shell_words
from mlx_sora.geometry import FRAMES_PER_CELL, MICRO_FRAME_SIZE, Size, latent_frames
from mlx_sora.models.vae import chunk_plan
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.request.options import ImageReference, VideoReference
from mlx_sora.request.pixels import Pixels
from mlx_sora.text.prompt import PromptDirectives
from mlx_sora.utils.files import sha256
from mlx_sora.video.reader import ResizeCrop, VideoInfo, image_size, is_video, probe_video

#: Latent frames of a chunk: starts of a mask strategy are aligned to them.
CHUNK_LATENTS = latent_frames(MICRO_FRAME_SIZE)

#: A video's decoder needs this many times a picture's memory per pixel.
PICTURE_SHARE = 5


@dataclass(frozen=True)
class MediaFile:
    """An image or video: size, frames (1 for an image), checksum, rate (None for an image).

    path: or Pixels, in memory. video: properties of a video.
    """

    path: str
    size: Size
    num_frames: int
    sha256: str
    fps: float | None = None
    video: VideoInfo | None = None

    @classmethod
    def from_path(cls, path: str) -> MediaFile:
        """Read the header of an image, or decode a video. Raises UsageError."""
        if not is_video(path):
            return cls(path, image_size(path), 1, _checksum(path))
        info = probe_video(path)
        return cls(path, info.size, info.num_frames, _checksum(path), info.fps, info)

    @property
    def source_pixels(self) -> int:
        """Pixels of a video frame that take as much memory as decoding this file."""
        pixels = self.size.width * self.size.height
        return pixels // PICTURE_SHARE if self.video is None else pixels

    @property
    def latents(self) -> int:
        """Number of its latent frames."""
        return latent_frames(self.num_frames)


@dataclass(frozen=True)
class MediaClip:
    """Frames `frames` of clip `clip` show `file` from its frame `start` on.

    latents: latent frames of the clip that they condition. edit_ratio: as in MaskGroup.
    """

    file: MediaFile
    start: int
    clip: int
    frames: range
    latents: tuple[int, ...]
    edit_ratio: float


@dataclass(frozen=True)
class Media:
    """All media of a request. notes: lines for the user; warnings: deviations from the request."""

    clips: Clips
    media_clips: tuple[MediaClip, ...] = ()
    references: tuple[MediaFile, ...] = ()
    mask_groups: tuple[MaskGroup, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def files(self) -> list[MediaFile]:
        """Every file once, in order."""
        return list(dict.fromkeys([item.file for item in self.media_clips] + [*self.references]))

    def spans(self, clip: int) -> list[LatentSpan]:
        """Return the spans copied into `clip` from the references and from earlier clips."""
        latents = latent_frames(self.clips.num_frames)
        lengths = [file.latents for file in self.references] + [latents] * clip
        return resolve_mask_strategy(self.mask_groups, clip, lengths, latents, CHUNK_LATENTS)

    def mask(self, clip: int) -> list[float]:
        """Return the edit ratio of each latent frame of a clip: 1 if nothing conditions it."""
        mask = [1.0] * latent_frames(self.clips.num_frames)
        for item in self.media_clips:
            if item.clip == clip:
                for index in item.latents:
                    mask[index] = item.edit_ratio
        for span in self.spans(clip):
            for index in span.target:
                mask[index] = span.edit_ratio
        return mask

    def with_size(self, size: Size) -> Media:
        """Return the media for clips of `size` pixels; their notes say how they are fitted."""
        return replace(self, notes=tuple(_fit_notes(self.files, size)), warnings=())

    def to_metadata(self) -> list[dict[str, Any]]:
        """Return path, checksum, size and frames of each file."""
        return [
            {
                "path": file.path,
                "sha256": file.sha256,
                "size": str(file.size),
                "num_frames": file.num_frames,
            }
            for file in self.files
        ]


def plan_media(
    request: GenerationRequest, directives: PromptDirectives, clips: Clips, size: Size, fps: float
) -> Media:
    """Assign the media of a request to its clips, which have `size` pixels.

    directives: settings inside the prompt, which override those of the request. Raises UsageError
    for media that cannot be read or do not fit the clips.
    """
    strategy = directives.mask_strategy
    # A prompt that turns the strategy off leaves the request's references without use.
    paths = () if strategy == "" else request.references
    paths = paths if directives.references is None else directives.references
    strategy = request.mask_strategy if strategy is None else strategy
    media_paths = [item.path for item in request.images] + [item.path for item in request.videos]
    found = {path: MediaFile.from_path(path) for path in dict.fromkeys([*media_paths, *paths])}
    items = [_image_clip(item, found[item.path], clips) for item in request.images]
    items += [_video_clip(item, found[item.path], clips) for item in request.videos]
    _check_overlap(items)
    files = tuple(found[path] for path in paths)
    groups = _mask_groups(strategy, files, clips)
    loops, shared = range(1, clips.count), clips.shared_latents
    continued = append_generated(loops, len(files), shared, request.condition_edit)
    media = Media(
        clips,
        tuple(items),
        files,
        tuple(groups + continued),
        notes=(
            *_video_lines(found.values(), "notes"),
            *_fit_notes(found.values(), size),
        ),
        warnings=(
            *_video_lines(found.values(), "warnings"),
            *_frame_rate_warnings(found.values(), fps),
            *_alignment_warnings(groups, files, clips),
        ),
    )
    for clip in range(clips.count):
        if not any(media.mask(clip)):
            raise UsageError(
                "The media fix every frame, so nothing is left to generate.",
                "Give fewer frames, a strength below 1, or ask for a longer video.",
            )
    return media


def _checksum(path: str) -> str:
    return path.sha256 if isinstance(path, Pixels) else sha256(Path(path))


def frames_by_latent(num_frames: int) -> list[range]:
    """Return the frames that each latent frame of a clip encodes."""
    ranges = []
    for chunk in chunk_plan(num_frames, MICRO_FRAME_SIZE, FRAMES_PER_CELL):
        front = -chunk.frames % FRAMES_PER_CELL
        for index in range(chunk.latents):
            first = index * FRAMES_PER_CELL - front
            last = min(first + FRAMES_PER_CELL, chunk.frames)
            ranges.append(range(chunk.frame + max(first, 0), chunk.frame + last))
    return ranges


def _image_clip(item: ImageReference, file: MediaFile, clips: Clips) -> MediaClip:
    """Show an image in one frame; it conditions the latent frame of that frame."""
    if file.fps is not None:
        raise UsageError(f"--image {item.path} is a video.", "Give it to --video.")
    frame = item.frame + clips.total if item.frame < 0 else item.frame
    if not 0 <= frame < clips.total:
        raise UsageError(
            f"--image {item.path}: frame {item.frame} is out of range: there are {clips.total}.",
            f"Give 0 to {clips.total - 1}, first, or last.",
        )
    clip, local = clips.locate(frame)
    ranges = frames_by_latent(clips.num_frames)
    latent = next(index for index, frames in enumerate(ranges) if local in frames)
    return MediaClip(file, 0, clip, range(local, local + 1), (latent,), 1 - item.strength)


def _video_clip(item: VideoReference, file: MediaFile, clips: Clips) -> MediaClip:
    """Show the end of a video before the first clip, or the start of one after the last."""
    if file.fps is None:
        raise UsageError(f"--video {item.path} is an image.", "Give it to --image.")
    if item.frames > file.num_frames:
        raise UsageError(
            f"--video {item.path} has {file.num_frames} frames, {item.frames} are to be used.",
            "Give a longer video, or: "
            + shell_words("--video", item.path, item.side, file.num_frames),
        )
    if item.frames > clips.num_frames:
        raise UsageError(
            f"--video {item.path}: {item.frames} of its frames do not fit into {clips.num_frames}.",
            "Use fewer, or raise --num-frames.",
        )
    before = item.side == "before"
    clip = 0 if before else clips.count - 1
    first = 0 if before else clips.num_frames - item.frames
    frames = range(first, first + item.frames)
    ranges = frames_by_latent(clips.num_frames)
    latents = tuple(i for i, each in enumerate(ranges) if set(each) <= set(frames))
    if not latents:
        raise UsageError(
            f"--video {item.path} after: the last latent frame encodes {len(ranges[-1])} frames, "
            f"not {item.frames}.",
            f"Use at least {len(ranges[-1])}.",
        )
    start = file.num_frames - item.frames if before else 0
    return MediaClip(file, start, clip, frames, latents, 1 - item.strength)


def _check_overlap(items: Sequence[MediaClip]) -> None:
    owners: dict[tuple[int, int], MediaClip] = {}
    for item in items:
        for latent in item.latents:
            other = owners.setdefault((item.clip, latent), item)
            if other is not item:
                raise UsageError(
                    f"{other.file.path} and {item.file.path} lie on the same frames "
                    f"(one latent frame stands for up to {FRAMES_PER_CELL}).",
                    "Move one of them.",
                )


def _mask_groups(
    strategy: str | None, references: Sequence[MediaFile], clips: Clips
) -> list[MaskGroup]:
    groups = parse_mask_strategy(strategy)
    if references and not groups:
        raise UsageError(
            f"References do nothing without a mask strategy: {references[0].path}.",
            'Give one, such as "0" to begin with the first reference.',
        )
    latents = latent_frames(clips.num_frames)
    for group in groups:
        before = min(max(group.loop, 0), clips.count)
        lengths = [file.latents for file in references] + [latents] * before
        problem = _out_of_range(group, lengths, latents, clips)
        if problem:
            raise UsageError(
                f"Mask strategy {str(group)!r}: {problem}.",
                "Order: loop, reference, reference start, target start, length, edit.",
            )
    return groups


def _out_of_range(group: MaskGroup, lengths: Sequence[int], latents: int, clips: Clips) -> str:
    if not 0 <= group.loop < clips.count:
        return f"loop {group.loop} is out of range: {clips.count} made, counted from 0"
    if not 0 <= group.reference < len(lengths):
        return f"reference {group.reference} is out of range: {len(lengths)} given, counted from 0"
    length = lengths[group.reference]
    if not -length <= group.reference_start < length:
        return f"reference start {group.reference_start} is out of range: {length} latent frames"
    if not -latents <= group.target_start < latents:
        return f"target start {group.target_start} is out of range: {latents} latent frames"
    if group.length < 1:
        return f"the length {group.length} is below 1"
    return (
        "" if 0 <= group.edit_ratio <= 1 else f"the edit ratio {group.edit_ratio:g} is not 0 to 1"
    )


def _video_lines(files: Iterable[MediaFile], kind: str) -> Iterator[str]:
    for file in files:
        if file.video is not None:
            yield from getattr(file.video, kind)


def _fit_notes(files: Iterable[MediaFile], size: Size) -> Iterator[str]:
    for file in files:
        yield f"{file.path}: {ResizeCrop.from_sizes(file.size, size)}."


def _frame_rate_warnings(files: Iterable[MediaFile], fps: float) -> Iterator[str]:
    for file in files:
        if file.fps and abs(file.fps - fps) > 0.01 * fps:
            yield f"{file.path} has {file.fps:g} frames per second; they are used at {fps:g}."


def _alignment_warnings(
    groups: Sequence[MaskGroup], references: Sequence[MediaFile], clips: Clips
) -> Iterator[str]:
    latents = latent_frames(clips.num_frames)
    for group in groups:
        lengths = [file.latents for file in references] + [latents] * group.loop
        exact, aligned = (
            resolve_mask_strategy([group], group.loop, lengths, latents, unit)[0]
            for unit in (None, CHUNK_LATENTS)
        )
        if (exact.source, exact.target) != (aligned.source, aligned.target):
            yield (
                f"Mask strategy {str(group)!r}: latent frames {_format_range(aligned.source)} of "
                f"the reference go to {_format_range(aligned.target)}, where a chunk of the VAE "
                "begins."
            )


def _format_range(frames: range) -> str:
    return f"{frames.start} to {frames.stop - 1}" if len(frames) > 1 else str(frames.start)
