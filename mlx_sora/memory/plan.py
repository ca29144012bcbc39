"""Data of the memory planner: sizes of a model, a workload, a machine, and the plan. In bytes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlx_sora.geometry import Geometry, Size, latent_frames
from mlx_sora.models.stdit3 import STDiT3Config
from mlx_sora.models.t5 import T5Config
from mlx_sora.models.vae import VAEConfig

FLOAT32_SIZE, HALF_SIZE = 4, 2

# Memory outside MLX: measured on x86 Linux with Python 3.10 to 3.13, PyAV 17 to 19, Pillow 12 and
# 13, and x264 with four threads.

#: Interpreter, libraries, and what their allocators hold back. On CPUs 78 MB (90 with Python 3.13);
#: not measured on GPUs.
PROGRAM, PROGRAM_GPU = 96 << 20, 160 << 20

#: PyAV and its libraries, once a video has been opened, and formats that it writes.
PYAV, PYAV_SUFFIXES = 18 << 20, (".mp4", ".mov", ".webm")


@dataclass(frozen=True)
class FileMemory:
    """Memory of a reader or writer: fixed, per pixel of a frame, and per pixel of all frames."""

    fixed: int
    pixel: int
    all_pixels: int = 0

    def total(self, pixels: int, frames: int = 1) -> int:
        """Return the bytes for `frames` frames of `pixels` pixels each."""
        return self.fixed + pixels * (self.pixel + frames * self.all_pixels)


#: Writers by suffix. Pillow takes all frames of a WebP or GIF at once; "" holds them in memory.
WRITERS = {
    ".mp4": FileMemory(8 << 20, 300),
    ".mov": FileMemory(8 << 20, 300),
    ".webm": FileMemory(30 << 20, 240),
    ".webp": FileMemory(5 << 20, 20, 8),
    ".gif": FileMemory(5 << 20, 40, 3),
    ".png": FileMemory(4 << 20, 24),
    "": FileMemory(0, 0, 6),
}

#: Readers: of videos with some twenty reference frames (in 4K 39 bytes per pixel of H.264, 56 of
#: 10-bit HEVC), and of pictures.
VIDEO_READER, PICTURE_READER = FileMemory(18 << 20, 60), FileMemory(4 << 20, 60)

#: PSNR and SSIM of frames to others: 17 of them, and the sums of a channel in 8 bytes.
COMPARISON = FileMemory(0, 17 * 3 + 12 * 8)


def program_memory(*, gpu: bool) -> int:
    """Return the bytes of the process before it has read or written a file."""
    return PROGRAM_GPU if gpu else PROGRAM


def writer_memory(suffix: str, size: Size, frames: int) -> int:
    """Return the bytes that writing a file takes. suffix: "" if its frames stay in memory."""
    return WRITERS[suffix].total(size.width * size.height, frames)


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of the weights of a network that is made of blocks.

    load_peak_bytes: peak while one block is loaded.
    rest: everything outside the blocks.
    stored_blocks, stored_rest: blocks and rest on disk.
    largest_dequantized: the largest quantized layer after dequantization; 0 without any.
    """

    blocks: tuple[int, ...]
    load_peak_bytes: int
    rest: int
    stored_blocks: int
    stored_rest: int
    largest_dequantized: int = 0

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.rest

    @property
    def stored(self) -> int:
        return self.stored_blocks + self.stored_rest


@dataclass(frozen=True)
class VAESizes:
    """Bytes of a VAE's temporal and spatial encoders or decoders in float32; stored: on disk.

    layers: of the temporal decoder, as blocks that can be streamed; None without any.
    """

    temporal: int
    spatial: int
    stored: int
    layers: WeightSizes | None = None

    def with_itemsize(self, itemsize: int) -> VAESizes:
        """Return the sizes with `itemsize` bytes per weight in memory.

        Loading a layer takes no more than in float32.
        """

        def scale(count: int) -> int:
            return count * itemsize // FLOAT32_SIZE

        layers = self.layers
        if layers is not None:
            blocks = tuple(map(scale, layers.blocks))
            layers = replace(layers, blocks=blocks, rest=scale(layers.rest))
        temporal, spatial = scale(self.temporal), scale(self.spatial)
        return replace(self, temporal=temporal, spatial=spatial, layers=layers)


@dataclass(frozen=True)
class ModelSizes:
    """Configurations and sizes of networks. vae_encoder: zeros if no media are encoded."""

    text: T5Config
    transformer: STDiT3Config
    vae: VAEConfig
    text_weights: WeightSizes
    transformer_weights: WeightSizes
    vae_decoder: VAESizes
    vae_encoder: VAESizes = VAESizes(0, 0, 0)


@dataclass(frozen=True)
class MediaWorkload:
    """Media to encode: chunks, frames of the longest one, pixels of the largest source frame.

    videos: False if all are pictures. waiting_bytes: frames of a first pass that wait in memory.
    """

    chunks: int
    chunk_frames: int
    source_pixels: int
    videos: bool = True
    waiting_bytes: int = 0

    @property
    def reader(self) -> FileMemory:
        """Memory of reading them."""
        return VIDEO_READER if self.videos else PICTURE_READER


@dataclass(frozen=True)
class StepVariant:
    """Work that an evaluation of the transformer leaves out.

    merged: parts of each block that see pairs of frames as one (TDTM; sites as in `models.hooks`).
    cond_only: the unconditional prediction is not computed.
    blocks_skipped: a cached residual replaces the block stack.
    """

    merged: tuple[tuple[str, ...], ...] = ()
    cond_only: bool = False
    blocks_skipped: bool = False


@dataclass(frozen=True)
class Workload:
    """One run, as far as memory and operations depend on it.

    evaluations: computed velocities per clip.
    variants: evaluations that leave something out, with the number of each.
    cached_residuals: residuals kept between evaluations, each of the whole CFG batch.
    guided: with CFG, in one pass or (sequential_guidance) in two.
    cfg_parallel: this rank computes one of the two predictions.
    inversion: an edit, which first runs as many unguided evaluations from the video to noise.
    captured_bytes: attention values that the inversion keeps.
    clips: clips of the video, all but the first with `shared_frames` frames of the clip before.
    window_texts: texts of clips that are denoised together, as windows; 0 if one after another.
    vae_tiles: tiles per side in which frames are decoded.
    vae_itemsize: bytes per weight and activation of the VAE.
    suffix: format of the file; "" if the frames stay in memory; None if they are not written (a
    first pass). scale: enlargement of its frames. other_bytes: memory outside MLX of other passes.
    vae_only: media are encoded and decoded, in `clips` parts, with no text and no denoising.
    """

    geometry: Geometry
    text_tokens: int
    evaluations: int
    variants: tuple[tuple[StepVariant, int], ...] = ()
    cached_residuals: float = 0
    guided: bool = True
    sequential_guidance: bool = False
    cfg_parallel: bool = False
    inversion: bool = False
    captured_bytes: int = 0
    media: MediaWorkload | None = None
    clips: int = 1
    shared_frames: int = 0
    window_texts: int = 0
    vae_tiles: int = 1
    vae_itemsize: int = FLOAT32_SIZE
    suffix: str | None = ".mp4"
    vae_only: bool = False
    scale: int = 1
    other_bytes: int = 0

    @property
    def num_frames(self) -> int:
        """Frames of all clips."""
        frames = self.geometry.num_frames
        return frames + (self.clips - 1) * (frames - self.shared_frames)

    @property
    def windowed(self) -> bool:
        """True if the clips are denoised together, as windows."""
        return self.window_texts > 0

    @property
    def all_latents(self) -> tuple[int, int, int]:
        """Latents (T, H, W) of these frames."""
        return latent_frames(self.num_frames), *self.geometry.latent[1:]

    @property
    def writer_bytes(self) -> int:
        """Memory of writing the file."""
        if self.suffix is None:
            return 0
        size = self.geometry.decoded.enlarged(self.scale)
        return writer_memory(self.suffix, size, self.num_frames)

    def outside(self, stage: str, *, gpu: bool) -> int:
        """Return the bytes outside MLX in a stage.

        Libraries stay loaded, and a file stays open between clips.
        """
        media, vae_only = self.media, self.vae_only
        between_clips = stage == "denoise" and self.clips > 1 and not self.windowed
        writes = stage == "decode" or vae_only or between_clips
        found = program_memory(gpu=gpu) + writes * self.writer_bytes + self.other_bytes
        if media is not None:
            readers = 1 + vae_only  # of which one is for the comparison
            pixels = media.source_pixels if stage == "read" or vae_only else 0
            found += readers * media.reader.total(pixels)
            found += media.waiting_bytes * (stage == "read")
        if vae_only:
            found += COMPARISON.total(math.prod(self.geometry.decoded))
        if (media is not None and media.videos) or (writes and self.suffix in PYAV_SUFFIXES):
            found += PYAV
        return found

    @property
    def batch(self) -> int:
        return 2 if self.guided and not (self.sequential_guidance or self.cfg_parallel) else 1

    @property
    def evaluations_by_variant(self) -> dict[StepVariant, int]:
        """Number of evaluations of each variant, those that leave out nothing included."""
        rest = self.evaluations - sum(count for _, count in self.variants)
        return {StepVariant(): rest, **dict(self.variants)}

    @property
    def block_passes(self) -> int:
        """Passes through the block stack in one clip."""
        two_passes = self.guided and self.sequential_guidance
        passes = sum(
            count * (2 if two_passes and not variant.cond_only else 1)
            for variant, count in self.evaluations_by_variant.items()
            if not variant.blocks_skipped
        )
        return passes + self.inversion * self.evaluations


@dataclass(frozen=True)
class Machine:
    """The device that computes. itemsize: bytes per weight in memory.

    cache_limit: bytes of freed buffers that MLX may keep in a run without a budget.
    largest_array: most bytes of one array (Metal's maxBufferLength); None without a limit.
    can_throttle: MLX's scheduler waits for memory. That of CUDA does not: it counts no work that it
    sends off early (mlx/backend/cuda/eval.cpp).
    """

    gpu: bool
    cache_limit: int
    itemsize: int = FLOAT32_SIZE
    largest_array: int | None = None
    can_throttle: bool = True

    def can_allocate(self, array: int) -> bool:
        """Return True if one array may have `array` bytes."""
        return self.largest_array is None or array <= self.largest_array


@dataclass(frozen=True)
class StagePlan:
    """Plan of one stage.

    Blocks are those of a network, or layers of the temporal decoder; none if it is not streamed.
    peak: bytes of the process. read: bytes from disk.
    throttled: MLX's scheduler may not allocate ahead, which needs less memory.
    resident: blocks, of `blocks`, that stay in memory.
    prefetch: streamed blocks are read ahead.
    reserve: bytes that the first pass does not show yet (see `Residency`).
    micro_batch: frames per pass of the spatial VAE.
    sequential_offload: the temporal VAE is freed before the spatial one is loaded.
    """

    stage: str
    peak: int
    read: int
    flops: int
    cache_limit: int
    memory_limit: int
    throttled: bool
    blocks: int = 0
    resident: int = 0
    prefetch: bool = False
    reserve: int = 0
    micro_batch: int | None = None
    sequential_offload: bool = False

    @property
    def is_resident(self) -> bool:
        """True if the stage is a stack of blocks that all stay in memory."""
        return 0 < self.blocks == self.resident


@dataclass(frozen=True)
class Plan:
    """Plan of a run. smallest: the least budget that would do."""

    stages: tuple[StagePlan, ...]
    budget: int | None
    smallest: int

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    def stage(self, name: str) -> StagePlan:
        """Return the plan of stage `name`: that of the last pass that has one."""
        return next(stage for stage in reversed(self.stages) if stage.stage == name)

    def without(self, other: Plan) -> Plan:
        """Return the plan without the stages that it took over from another."""
        own = (s for s in self.stages if not any(s is each for each in other.stages))
        return replace(self, stages=tuple(own))

    def with_cached_text(self) -> Plan:
        """Return the plan of a run whose text was encoded before: T5 is neither read nor run.

        Its memory stays planned, in case the cache is gone when the run begins.
        """
        encode = self.stage("encode")
        cached = replace(encode, read=0, flops=0)
        stages = tuple(cached if stage is encode else stage for stage in self.stages)
        return replace(self, stages=stages)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values. `sequential_offload` keeps its published key, `in_turn`."""
        values = asdict(self) | {"peak": self.peak}
        for stage in values["stages"]:
            stage["in_turn"] = stage.pop("sequential_offload")
        return values
