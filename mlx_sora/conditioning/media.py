"""What pictures and videos give to the clips of a request: decided from their headers, unread.

A picture or video is laid onto the frames that it is to show. A clip's latent frames that follow
from those are given; they are encoded together with still frames around them, because a frame that
is alone in its chunk of the VAE comes out differently (its norms see padding).

References with a mask strategy are Open-Sora's own form: each is encoded by itself, and its latent
frames are put where the strategy says, at the starts of chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from mlx_sora.errors import UsageError
from mlx_sora.geometry import FRAMES_PER_CELL, MICRO_FRAME_SIZE, Size, latent_frames
from mlx_sora.models.vae import chunk_plan
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.request.options import ImageReference, VideoReference
from mlx_sora.text import prompt as syntax
from mlx_sora.utils.files import sha256
from mlx_sora.video.reader import ResizeCrop, VideoInfo, image_size, is_video, probe_video

#: Where the VAE's chunks begin, in latent frames: starts of a mask strategy move there.
CHUNK_LATENTS = latent_frames(MICRO_FRAME_SIZE)


@dataclass(frozen=True)
class MediaFile:
    """A picture or video: size, frames (1 for a picture), checksum, rate (None for a picture)."""

    path: str
    size: Size
    num_frames: int
    sha256: str
    fps: float | None = None

    @classmethod
    def from_path(cls, path: str) -> MediaFile:
        """Looks at the header. Raises UsageError for what cannot be read."""
        if not is_video(path):
            return cls(path, image_size(path), 1, sha256(Path(path)))
        info: VideoInfo = probe_video(path)
        return cls(path, info.size, info.num_frames, sha256(Path(path)), info.fps)

    @property
    def latents(self) -> int:
        """Latent frames of all of it."""
        return latent_frames(self.num_frames)


@dataclass(frozen=True)
class MediaClip:
    """Frames `frames` of clip `clip` show `source` from its frame `start` on.

    latents: the clip's latent frames that are given by them. edit: as in Placement.
    """

    file: MediaFile
    start: int
    clip: int
    frames: range
    latents: tuple[int, ...]
    edit_ratio: float


@dataclass(frozen=True)
class Media:
    """All that the clips are given. notes: lines for the user; warnings: what was not as asked."""

    clips: Clips
    media_clips: tuple[MediaClip, ...] = ()
    references: tuple[MediaFile, ...] = ()
    mask_groups: tuple[MaskGroup, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def files(self) -> list[MediaFile]:
        """Every file once, in order."""
        found = [patch.file for patch in self.media_clips] + list(self.references)
        return list(dict.fromkeys(found))

    def spans(self, clip: int) -> list[LatentSpan]:
        """What goes from references, and clips before this one behind them, into clip `clip`."""
        latents = latent_frames(self.clips.num_frames)
        lengths = [source.latents for source in self.references] + [latents] * clip
        return resolve_mask_strategy(self.mask_groups, clip, lengths, latents, CHUNK_LATENTS)

    def mask(self, clip: int) -> list[float]:
        """Per latent frame of a clip: 1 is generated, 0 kept, between: from that level on."""
        mask = [1.0] * latent_frames(self.clips.num_frames)
        given = [
            (patch.latents, patch.edit_ratio) for patch in self.media_clips if patch.clip == clip
        ]
        given += [(tuple(span.target), span.edit_ratio) for span in self.spans(clip)]
        for latents, edit in given:
            for index in latents:
                mask[index] = edit
        return mask

    def to_metadata(self) -> list[dict[str, Any]]:
        """The files and their checksums, for the metadata."""
        return [
            {
                "path": source.path,
                "sha256": source.sha256,
                "size": str(source.size),
                "num_frames": source.num_frames,
            }
            for source in self.files
        ]


def plan_media(
    request: GenerationRequest,
    directives: syntax.PromptDirectives,
    clips: Clips,
    size: Size,
    fps: float,
) -> Media:
    """What a request gives to its clips of `size` pixels. written: settings inside the prompt.

    Raises UsageError for media that cannot be read, and for what does not fit the clips.
    """
    references = directives.reference_path
    strategy = directives.mask_strategy
    paths = request.references if references is None else tuple(filter(None, references.split(";")))
    strategy = request.mask_strategy if strategy is None else strategy
    found = {path: MediaFile.from_path(path) for path in _media_paths(request, paths)}
    patches = [_image_clip(item, found[item.path], clips) for item in request.images]
    patches += [_video_clip(item, found[item.path], clips) for item in request.videos]
    _check_overlap(patches)
    placements = _mask_groups(strategy, [found[path] for path in paths], clips)
    loops, shared = range(1, clips.count), clips.shared_latents
    following = append_generated(loops, len(paths), shared, request.condition_edit)
    media = Media(
        clips,
        tuple(patches),
        tuple(found[path] for path in paths),
        tuple(placements + following),
        notes=tuple(
            f"{source.path}: {ResizeCrop.from_sizes(source.size, size)}."
            for source in found.values()
        ),
        warnings=tuple(_frame_rate_warnings(found.values(), fps))
        + tuple(_alignment_warnings(placements, found, paths, clips)),
    )
    for clip in range(clips.count):
        if not any(media.mask(clip)):
            raise UsageError(
                "Every frame is given, so nothing is left to generate.",
                "Give fewer frames, a strength below 1, or ask for a longer video.",
            )
    return media


def frames_by_latent(num_frames: int) -> list[range]:
    """The frames that each latent frame of a clip stands for."""
    shown = []
    for chunk in chunk_plan(num_frames, MICRO_FRAME_SIZE, FRAMES_PER_CELL):
        front = -chunk.frames % FRAMES_PER_CELL
        for index in range(chunk.latents):
            first = index * FRAMES_PER_CELL - front
            last = min(first + FRAMES_PER_CELL, chunk.frames)
            shown.append(range(chunk.frame + max(first, 0), chunk.frame + last))
    return shown


def _media_paths(request: GenerationRequest, references: Sequence[str]) -> list[str]:
    paths = [item.path for item in request.images] + [item.path for item in request.videos]
    return list(dict.fromkeys([*paths, *references]))


def _image_clip(item: ImageReference, source: MediaFile, clips: Clips) -> MediaClip:
    """A picture shown by one frame, and so by the latent frame that stands for it."""
    if source.fps is not None:
        raise UsageError(f"--image {item.path} is a video.", "Give it to --video.")
    frame = item.frame + clips.total if item.frame < 0 else item.frame
    if not 0 <= frame < clips.total:
        raise UsageError(
            f"--image {item.path}: there is no frame {item.frame} in {clips.total}.",
            f"Give 0 to {clips.total - 1}, first, or last.",
        )
    clip, local = clips.locate(frame)
    shown = frames_by_latent(clips.num_frames)
    latent = next(index for index, frames in enumerate(shown) if local in frames)
    return MediaClip(source, 0, clip, range(local, local + 1), (latent,), 1 - item.strength)


def _video_clip(item: VideoReference, source: MediaFile, clips: Clips) -> MediaClip:
    """The end of a video before the first clip, or the beginning of one after the last."""
    if source.fps is None:
        raise UsageError(f"--video {item.path} is a picture.", "Give it to --image.")
    if item.frames > source.num_frames:
        raise UsageError(
            f"--video {item.path} has {source.num_frames} frames, {item.frames} are to be used.",
            f"Give a longer video, or --video {item.path} {item.side} {source.num_frames}.",
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
    shown = frames_by_latent(clips.num_frames)
    latents = tuple(i for i, each in enumerate(shown) if set(each) <= set(frames))
    if not latents:
        raise UsageError(
            f"--video {item.path} after: the last latent frame stands for {len(shown[-1])} frames, "
            f"not for {item.frames}.",
            f"Use at least {len(shown[-1])}.",
        )
    start = source.num_frames - item.frames if before else 0
    return MediaClip(source, start, clip, frames, latents, 1 - item.strength)


def _check_overlap(patches: Sequence[MediaClip]) -> None:
    """Raise UsageError where two media give the same latent frame."""
    taken: dict[tuple[int, int], MediaClip] = {}
    for patch in patches:
        for latent in patch.latents:
            other = taken.setdefault((patch.clip, latent), patch)
            if other is not patch:
                raise UsageError(
                    f"{other.file.path} and {patch.file.path} lie on the same frames "
                    f"(one latent frame stands for up to {FRAMES_PER_CELL}).",
                    "Move one of them.",
                )


def _mask_groups(
    strategy: str | None, references: Sequence[MediaFile], clips: Clips
) -> list[MaskGroup]:
    """Placements of a mask strategy that can all be carried out. Raises UsageError."""
    placements = parse_mask_strategy(strategy)
    if references and not placements:
        raise UsageError(
            f"References do nothing without a mask strategy: {references[0].path}.",
            'Give one, such as "0" to begin with the first reference.',
        )
    latents = latent_frames(clips.num_frames)
    for item in placements:
        before = min(max(item.loop, 0), clips.count)
        lengths = [source.latents for source in references] + [latents] * before
        complaint = _out_of_range(item, lengths, latents, clips)
        if complaint:
            raise UsageError(
                f"Mask strategy {str(item)!r}: {complaint}.",
                "Order: loop, reference, reference start, target start, length, edit.",
            )
    return placements


def _out_of_range(item: MaskGroup, lengths: Sequence[int], latents: int, clips: Clips) -> str:
    """What is out of range in a placement, or nothing."""
    if not 0 <= item.loop < clips.count:
        return f"there is no loop {item.loop} of {clips.count}"
    if not 0 <= item.reference < len(lengths):
        return f"there is no reference {item.reference} of {len(lengths)}"
    length = lengths[item.reference]
    if not -length <= item.reference_start < length:
        return f"its reference has no latent frame {item.reference_start} of {length}"
    if not -latents <= item.target_start < latents:
        return f"the clip has no latent frame {item.target_start} of {latents}"
    if item.length < 1:
        return f"a length of {item.length}"
    return "" if 0 <= item.edit_ratio <= 1 else f"an edit of {item.edit_ratio:g}, not 0 to 1"


def _frame_rate_warnings(sources: Iterable[MediaFile], fps: float) -> Iterable[str]:
    for source in sources:
        if source.fps is not None and abs(source.fps - fps) > 0.01 * fps:
            yield f"{source.path} has {source.fps:g} frames per second; they are used at {fps:g}."


def _alignment_warnings(
    placements: Sequence[MaskGroup], found: dict[str, MediaFile], paths: Sequence[str], clips: Clips
) -> Iterable[str]:
    """What of a mask strategy had to be moved to the start of a chunk."""
    latents = latent_frames(clips.num_frames)
    for item in placements:
        lengths = [found[path].latents for path in paths] + [latents] * item.loop
        wanted, done = (
            resolve_mask_strategy([item], item.loop, lengths, latents, unit)[0]
            for unit in (None, CHUNK_LATENTS)
        )
        if (wanted.source, wanted.target) != (done.source, done.target):
            yield (
                f"Mask strategy {str(item)!r}: latent frames {_format_range(done.source)} of the "
                f"reference go to {_format_range(done.target)}, where a chunk of the VAE begins."
            )


def _format_range(frames: range) -> str:
    return f"{frames.start} to {frames.stop - 1}" if len(frames) > 1 else str(frames.start)
