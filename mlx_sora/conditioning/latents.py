"""Media as latents: what has to be read and encoded, and what each clip begins with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_sora.conditioning.mask_strategy import apply_mask_strategy
from mlx_sora.conditioning.media import Media, MediaClip, MediaFile
from mlx_sora.geometry import FRAMES_PER_CELL, MICRO_FRAME_SIZE, Size
from mlx_sora.models.vae import Chunk, chunk_plan
from mlx_sora.sampling.loop import Conditioning
from mlx_sora.sampling.noise import Noise
from mlx_sora.video.reader import is_video, read_image, read_video

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class EncodeTask:
    """One chunk to read and encode, `frames` frames.

    owner: the clip, or (counted from -1 downwards) the reference whose latent frames `latents`
    it gives, the first ones of the chunk's. read: its pixels, uint8 [frames, H, W, 3].
    """

    owner: int
    latents: range
    frames: int
    read: Callable[[], np.ndarray]


def encode_tasks(media: Media, size: Size) -> list[EncodeTask]:
    """All chunks to encode, in pictures of `size`; those that no clip needs are left out."""
    found = []
    for clip in sorted({patch.clip for patch in media.media_clips}):
        patches = [patch for patch in media.media_clips if patch.clip == clip]
        wanted = {index for patch in patches for index in patch.latents}
        chunks = _needed_chunks(media.clips.num_frames, wanted)
        found += [
            _chunk_task(clip, chunk, partial(_read_media_clips, patches, chunk, size))
            for chunk in chunks
        ]
    for number, source in enumerate(media.references):
        wanted = {
            index
            for clip in range(media.clips.count)
            for span in media.spans(clip)
            if span.reference == number
            for index in span.source
        }
        chunks = _needed_chunks(source.num_frames, wanted)
        found += [_reference_task(-1 - number, source, chunk, media, size) for chunk in chunks]
    return found


class ConditioningLatents:
    """Latents that media came to, [1, T, h, w, C] each, and those of clips that were made."""

    def __init__(self, media: Media, latent: tuple[int, int, int], channels: int) -> None:
        """latent: T, h, w of a clip."""
        self._media, self._latent = media, latent
        frames = [source.latents for source in media.references]
        self._references = [mx.zeros((1, n, *latent[1:], channels)) for n in frames]
        clips = {patch.clip for patch in media.media_clips}
        self._media_latents = {clip: mx.zeros((1, *latent, channels)) for clip in clips}
        self._generated: dict[int, mx.array] = {}
        first = len(media.references)
        #: Clip that was made → the last one that is made from it.
        self._last_use = {
            span.reference - first: clip
            for clip in range(media.clips.count)
            for span in media.spans(clip)
            if span.reference >= first
        }

    def set_latents(self, task: EncodeTask, encoded: mx.array) -> None:
        """Take the latents of a task's chunk."""
        home = (
            self._references[-1 - task.owner] if task.owner < 0 else self._media_latents[task.owner]
        )
        home[:, task.latents.start : task.latents.stop] = encoded[:, : len(task.latents)]
        mx.eval(home)

    def initial_latents(self, clip: int, noise: Noise) -> tuple[mx.array, Conditioning | None]:
        """What clip `clip` begins with, from its noise; None where all of it is generated."""
        z, mask = noise.initial(), self._media.mask(clip)
        if all(share == 1 for share in mask):
            return z, None
        for patch in self._media.media_clips:
            if patch.clip == clip:
                for index in patch.latents:
                    z[:, index] = self._media_latents[clip][:, index]
        behind = [self._generated.get(i, z[:, :0]) for i in range(clip)]
        z, _ = apply_mask_strategy(z, [*self._references, *behind], self._media.spans(clip))
        return z, Conditioning(mx.array([mask]), noise)

    def remember(self, clip: int, latents: mx.array) -> None:
        """Remember a clip for those made from it; forget what no clip asks for any more."""
        made = self._generated | {clip: latents}
        self._generated = {i: z for i, z in made.items() if self._last_use.get(i, 0) > clip}


def _needed_chunks(num_frames: int, wanted: set[int]) -> list[Chunk]:
    """The chunks of a clip that hold one of the `wanted` latent frames."""
    chunks = chunk_plan(num_frames, MICRO_FRAME_SIZE, FRAMES_PER_CELL)
    return [c for c in chunks if wanted & set(range(c.latent, c.latent + c.latents))]


def _chunk_task(owner: int, chunk: Chunk, read: Callable[[], np.ndarray]) -> EncodeTask:
    return EncodeTask(owner, range(chunk.latent, chunk.latent + chunk.latents), chunk.frames, read)


def _reference_task(
    owner: int, source: MediaFile, chunk: Chunk, media: Media, size: Size
) -> EncodeTask:
    """A chunk of a reference; a picture for a video is encoded as the first of still frames."""
    if source.fps is not None:
        return _chunk_task(owner, chunk, partial(_read_video_chunk, source, chunk, size))
    frames = min(media.clips.num_frames, MICRO_FRAME_SIZE)
    return EncodeTask(owner, range(1), frames, partial(_read_repeated_image, source, frames, size))


def _read_video_chunk(source: MediaFile, chunk: Chunk, size: Size) -> np.ndarray:
    return read_video(source.path, chunk.frames, start=chunk.frame, size=size).frames


def _read_repeated_image(source: MediaFile, frames: int, size: Size) -> np.ndarray:
    import numpy as np

    picture = read_image(source.path, size)
    return np.broadcast_to(picture, (frames, *picture.shape))


def _read_media_clips(patches: list[MediaClip], chunk: Chunk, size: Size) -> np.ndarray:
    """A chunk of a clip: frames that are given, and between them the nearest of those."""
    import numpy as np

    known = sorted((frame, number) for number, p in enumerate(patches) for frame in p.frames)
    wanted = range(chunk.frame, chunk.frame + chunk.frames)
    nearest = [min(known, key=lambda item: abs(item[0] - frame)) for frame in wanted]
    shown: dict[tuple[int, int], np.ndarray] = {}
    for number, patch in enumerate(patches):
        frames = sorted({frame for frame, owner in nearest if owner == number})
        if frames:
            pixels = _read_frames(patch, range(frames[0], frames[-1] + 1), size)
            shown |= {(frame, number): pixels[frame - frames[0]] for frame in frames}
    return np.stack([shown[item] for item in nearest])


def _read_frames(patch: MediaClip, frames: range, size: Size) -> np.ndarray:
    """What a patch shows in `frames` of its clip."""
    if not is_video(patch.file.path):
        return read_image(patch.file.path, size)[None]
    start = patch.start + frames.start - patch.frames.start
    return read_video(patch.file.path, len(frames), start=start, size=size).frames
