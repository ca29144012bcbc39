"""Latents of media: the chunks to read and encode, and the initial latents of each clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_sora.conditioning.mask_strategy import apply_mask_strategy
from mlx_sora.conditioning.media import Media, MediaClip, MediaFile
from mlx_sora.geometry import FRAMES_PER_CELL, MICRO_FRAME_SIZE, Size
from mlx_sora.memory.plan import MediaWorkload
from mlx_sora.models.vae import Chunk, chunk_plan
from mlx_sora.sampling.base import NOISE_TIME
from mlx_sora.sampling.loop import Conditioning
from mlx_sora.sampling.noise import Noise
from mlx_sora.sampling.rflow import add_noise
from mlx_sora.video.reader import read_image, read_video

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class EncodeTask:
    """One chunk of `frames` frames to read and encode.

    owner: clip, or reference (counted from -1 downwards), that gets the first latents of the chunk
    as its `latents`. read: returns the chunk's pixels, uint8 [frames, H, W, 3].
    """

    owner: int
    latents: range
    frames: int
    read: Callable[[], np.ndarray]


def encode_tasks(media: Media, size: Size) -> list[EncodeTask]:
    """Return the chunks that the clips need, as images of `size`."""
    tasks = []
    for clip in sorted({item.clip for item in media.media_clips}):
        items = [item for item in media.media_clips if item.clip == clip]
        needed = {index for item in items for index in item.latents}
        tasks += [
            _chunk_task(clip, chunk, partial(_read_clip_chunk, items, chunk, size))
            for chunk in _needed_chunks(media.clips.num_frames, needed)
        ]
    for number, file in enumerate(media.references):
        needed = {
            index
            for clip in range(media.clips.count)
            for span in media.spans(clip)
            if span.reference == number
            for index in span.source
        }
        chunks = _needed_chunks(file.num_frames, needed)
        tasks += [_reference_task(-1 - number, file, chunk, media, size) for chunk in chunks]
    return tasks


def media_workload(media: Media, size: Size) -> MediaWorkload | None:
    """Return the work of encoding the media as images of `size`, or None if there are none."""
    tasks = encode_tasks(media, size)
    if not tasks:
        return None
    pixels = max(source.source_pixels for source in media.files)
    videos = any(source.video is not None for source in media.files)
    return MediaWorkload(len(tasks), max(task.frames for task in tasks), pixels, videos)


class ConditioningLatents:
    """Latents of the media and of generated clips that later clips continue; [1, T, h, w, C] each.

    latent: T, h, w of a clip.
    """

    def __init__(self, media: Media, latent: tuple[int, int, int], channels: int) -> None:
        self._media = media
        self._references = [
            mx.zeros((1, file.latents, *latent[1:], channels)) for file in media.references
        ]
        clips = {item.clip for item in media.media_clips}
        self._media_latents = {clip: mx.zeros((1, *latent, channels)) for clip in clips}
        self._generated: dict[int, mx.array] = {}
        first = len(media.references)
        #: Generated clip -> last clip that continues it.
        self._last_use = {
            span.reference - first: clip
            for clip in range(media.clips.count)
            for span in media.spans(clip)
            if span.reference >= first
        }

    def set_latents(self, task: EncodeTask, encoded: mx.array) -> None:
        """Store the latents of a task's chunk."""
        owner = task.owner
        latents = self._references[-1 - owner] if owner < 0 else self._media_latents[owner]
        latents[:, task.latents.start : task.latents.stop] = encoded[:, : len(task.latents)]
        mx.eval(latents)

    def initial_latents(
        self, clip: int, noise: Noise, first_pass: mx.array | None = None, level: float = 1.0
    ) -> tuple[mx.array, Conditioning | None]:
        """Return the latents at which `clip` starts; no Conditioning if all is generated.

        first_pass: latents [1, T, h, w, C] that take the place of pure noise, and get noise up to
        `level`. Given frames that denoising may change more than that begin with the others.
        """
        mask, z = self._media.mask(clip), noise.initial()
        if first_pass is None:
            z = self._with_media(clip, z, mask)
        else:
            base = self._with_media(clip, first_pass, mask)
            noised = add_noise(base, z, mx.array([level * NOISE_TIME]))
            begins = mx.array([each >= level for each in mask])
            z = mx.where(begins[:, None, None, None], noised, base)
        mask = [1.0 if each >= level else each for each in mask]
        return z, None if all(each == 1 for each in mask) else Conditioning(mx.array([mask]), noise)

    def _with_media(self, clip: int, z: mx.array, mask: list[float]) -> mx.array:
        """Put the given frames into z."""
        if all(level == 1 for level in mask):
            return z
        for item in self._media.media_clips:
            if item.clip == clip:
                for index in item.latents:
                    z[:, index] = self._media_latents[clip][:, index]
        generated = [self._generated.get(i, z[:, :0]) for i in range(clip)]
        spans = self._media.spans(clip)
        return apply_mask_strategy(z, [*self._references, *generated], spans)[0]

    def remember(self, clip: int, latents: mx.array) -> None:
        """Store a generated clip; drop those that no later clip continues."""
        generated = self._generated | {clip: latents}
        self._generated = {i: z for i, z in generated.items() if self._last_use.get(i, 0) > clip}


def _needed_chunks(num_frames: int, needed: set[int]) -> list[Chunk]:
    chunks = chunk_plan(num_frames, MICRO_FRAME_SIZE, FRAMES_PER_CELL)
    return [c for c in chunks if needed & set(range(c.latent, c.latent + c.latents))]


def _chunk_task(owner: int, chunk: Chunk, read: Callable[[], np.ndarray]) -> EncodeTask:
    return EncodeTask(owner, range(chunk.latent, chunk.latent + chunk.latents), chunk.frames, read)


def _reference_task(
    owner: int, file: MediaFile, chunk: Chunk, media: Media, size: Size
) -> EncodeTask:
    """Return the task of a reference's chunk; an image is repeated and gives its first latent."""
    if file.fps is not None:
        return _chunk_task(owner, chunk, partial(_read_video_chunk, file, chunk, size))
    frames = min(media.clips.num_frames, MICRO_FRAME_SIZE)
    return EncodeTask(owner, range(1), frames, partial(_read_repeated_image, file, frames, size))


def _read_video_chunk(file: MediaFile, chunk: Chunk, size: Size) -> np.ndarray:
    start, info = chunk.frame, file.video
    return read_video(file.path, chunk.frames, start=start, size=size, info=info).frames


def _read_repeated_image(file: MediaFile, frames: int, size: Size) -> np.ndarray:
    import numpy as np

    image = read_image(file.path, size)
    return np.broadcast_to(image, (frames, *image.shape))


def _read_clip_chunk(items: list[MediaClip], chunk: Chunk, size: Size) -> np.ndarray:
    """Read a chunk of a clip; other frames repeat the nearest frame of the media."""
    import numpy as np

    known = sorted((frame, number) for number, item in enumerate(items) for frame in item.frames)
    nearest = [
        min(known, key=lambda each: abs(each[0] - frame))
        for frame in range(chunk.frame, chunk.frame + chunk.frames)
    ]
    pixels: dict[tuple[int, int], np.ndarray] = {}
    for number, item in enumerate(items):
        frames = sorted({frame for frame, owner in nearest if owner == number})
        if frames:
            found = _read_frames(item, range(frames[0], frames[-1] + 1), size)
            pixels |= {(frame, number): found[frame - frames[0]] for frame in frames}
    return np.stack([pixels[each] for each in nearest])


def _read_frames(item: MediaClip, frames: range, size: Size) -> np.ndarray:
    if item.file.fps is None:
        return read_image(item.file.path, size)[None]
    start = item.start + frames.start - item.frames.start
    info = item.file.video
    return read_video(item.file.path, len(frames), start=start, size=size, info=info).frames
