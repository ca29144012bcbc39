"""Reconstruction: a video through the VAE and back, without transformer and prompt.

It shows what the VAE alone loses. Chunks of 17 frames are encoded and decoded as in a generation.
A part of the video after the other is read, encoded and decoded, so that memory does not grow with
its length.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_sora.errors import UsageError
from mlx_sora.geometry import (
    Geometry,
    Size,
    check_size,
    check_tiles,
    decoded_size,
    get_num_frames,
    latent_shape,
    resolve_size,
)
from mlx_sora.memory.budget import resolve_budget
from mlx_sora.memory.estimate import Estimate, estimate_from_speeds
from mlx_sora.memory.plan import MediaWorkload, Plan, Workload
from mlx_sora.memory.speeds import MachineSpeeds
from mlx_sora.models.vae import Chunk, MicroBatch, chunk_plan
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.generate import plan_memory
from mlx_sora.pipeline.locks import run_exclusively
from mlx_sora.pipeline.networks import NetworkLoader, decoded_frames
from mlx_sora.pipeline.run import RunResult
from mlx_sora.pipeline.stages import encode_pixels, shrink_if_over_budget
from mlx_sora.request.generation import GenerationRequest, options_of
from mlx_sora.request.options import as_medium
from mlx_sora.runtime.device import describe_device
from mlx_sora.runtime.events import (
    Event,
    Finished,
    Noted,
    PlannedStage,
    RunPlanned,
    StageProgress,
    StageStarted,
    Warned,
)
from mlx_sora.runtime.health import Health
from mlx_sora.utils.versions import versions
from mlx_sora.video import Video
from mlx_sora.video.frames import FramesInMemory, FrameWriter
from mlx_sora.video.metadata import without_folders
from mlx_sora.video.output_path import check_inputs, check_output, output_path
from mlx_sora.video.reader import (
    ResizeCrop,
    VideoInfo,
    probe_medium,
    read_image,
    video_frames,
)
from mlx_sora.video.similarity import Similarity
from mlx_sora.video.writer import open_writer

if TYPE_CHECKING:
    import numpy as np

#: Chunks that are encoded before they are decoded: each part reads the weights again.
PART_CHUNKS = 32


@dataclass(frozen=True)
class ReconstructionRun:
    """Plan of one reconstruction.

    video: properties of the source, None for an image. geometry: of a part of the video.
    num_frames: of all parts. output: None to hold the frames in memory.
    """

    engine: Engine
    request: GenerationRequest
    path: str
    video: VideoInfo | None
    geometry: Geometry
    num_frames: int
    fps: float
    output: Path | None
    workload: Workload
    plan: Plan
    notes: tuple[str, ...] = ()
    result: RunResult = field(default_factory=RunResult)

    @cached_property
    def loader(self) -> NetworkLoader:
        """Opens the stages within the memory budget."""
        return NetworkLoader(self.engine.model, self.engine.precision, self.plan.budget)

    @property
    def written(self) -> str:
        """Length, size and rate of the frames in the file, for people."""
        return (
            f"{self.num_frames} frames of {self.geometry.decoded} pixels, {self.fps:g} per second"
        )

    @property
    def parts(self) -> Iterator[int]:
        """Frames of each part."""
        longest = self.geometry.num_frames
        for first in range(0, self.num_frames, longest):
            yield min(longest, self.num_frames - first)

    def estimate(self, speeds: MachineSpeeds) -> Estimate:
        """Estimate the seconds of the run on the machine that has these speeds."""
        sizes = self.engine.sizes(encoders=True)
        return estimate_from_speeds(sizes, self.workload, self.plan, speeds, self.engine.precision)

    def planned_stages(self) -> Iterator[PlannedStage]:
        """Yield the stages of all parts."""
        work = {stage.stage: stage.flops / self.num_frames for stage in self.plan.stages}
        for frames in self.parts:
            chunks = len(self.chunks(frames))
            yield PlannedStage("read", chunks, work["read"] * frames)
            yield PlannedStage("decode", frames, work["decode"] * frames)

    def chunks(self, frames: int) -> list[Chunk]:
        """Return the chunks of a part of so many frames."""
        vae = self.engine.vae_config
        return chunk_plan(frames, vae.micro_frame_size, vae.temporal.factor)

    def frames(self) -> Iterator[np.ndarray]:
        """Yield the source frame by frame, filled into the size: uint8 [H, W, 3]."""
        size = self.geometry.decoded
        if self.video is None:
            return iter([read_image(self.path, size)])
        return video_frames(self.path, self.video, stop=self.num_frames, size=size)

    def record(self, similarity: Similarity) -> dict[str, Any]:
        """Return the metadata of the finished file."""
        width, height = self.geometry.decoded
        psnr = None if similarity.psnr is None else round(similarity.psnr, 3)
        found = {
            "reconstruction": {
                "video": self.path,
                "psnr": psnr,
                "ssim": round(similarity.ssim, 5),
            },
            "settings": {
                "model": self.engine.model.name,
                "width": width,
                "height": height,
                "num_frames": self.num_frames,
                "fps": self.fps,
                "vae_dtype": self.request.vae_dtype,
                "vae_tiles": self.workload.vae_tiles,
            },
            "warnings": list(self.result.warnings),
            "versions": versions(),
            "device": describe_device(),
            "seconds": {name: round(value, 3) for name, value in self.result.seconds.items()},
            "peak_memory": dict(self.result.memory),
        }
        return without_folders(found, [self.path])  # type: ignore[no-any-return]


def reconstruction_request(values: Mapping[str, Any]) -> GenerationRequest:
    """Return a request with the options of a reconstruction. Raises UsageError for others."""
    known = options_of("reconstruct")
    for name in values:
        if name not in known:
            raise UsageError(
                f"A reconstruction has no option {str(name)[:80]!r}.", f"Valid: {', '.join(known)}."
            )
    request = GenerationRequest.from_dict(values)
    for name, option in known.items():
        option.check_range(getattr(request, name))
    return request


def prepare_reconstruction(
    engine: Engine, video: Any, request: GenerationRequest
) -> ReconstructionRun:
    """Decide everything about a reconstruction. Reads no weights, and of the video its index.

    video: what `as_medium` takes. Raises UsageError if it cannot be read, and MemoryBudgetError
    as `prepare` does.
    """
    try:
        path = as_medium(video)
    except ValueError as error:
        raise UsageError(f"The video must be {error}.") from None
    engine = engine.single_process().for_request(request)
    source, available, fps, info = probe_medium(path, engine.model.defaults.fps)
    size = _resolve_size(request, source)
    num_frames = _resolve_frames(path, request, available)
    chunks = chunk_plan(num_frames, engine.vae_config.micro_frame_size)
    parts = -(-len(chunks) // PART_CHUNKS)
    longest = sum(chunk.frames for chunk in chunks[: -(-len(chunks) // parts)])
    geometry = Geometry(size, size, longest, latent_shape(longest, size))
    output = _resolve_output(path, request, size, num_frames, fps, engine.model.name)
    workload = Workload(
        geometry=geometry,
        text_tokens=1,
        evaluations=1,
        guided=False,
        media=MediaWorkload(len(chunks), chunks[0].frames, math.prod(source), info is not None),
        clips=parts,
        vae_tiles=check_tiles(request.vae_tiles or 1, geometry),
        vae_itemsize=engine.precision.vae.size,
        suffix="" if output is None else output.suffix.lower(),
        vae_only=True,
    )
    budget = resolve_budget(request.memory_budget, request.device_profile)
    plan, notes = plan_memory(engine, request, budget, workload)
    run = ReconstructionRun(
        engine, request, path, info, geometry, num_frames, fps, output, workload, plan, notes
    )
    fit = ResizeCrop.from_sizes(source, size)
    if fit.source != fit.size:
        run.result.warnings.append(f"{path}: {fit}.")
    if info is not None:
        run.result.warnings.extend(info.warnings)
    return run


def stream_reconstruction(
    engine: Engine, video: Any, request: GenerationRequest
) -> Generator[Event, None, None]:
    """Yield the events of a reconstruction, `Finished` last. Bad requests raise here."""
    run = prepare_reconstruction(engine, video, request)
    return run_exclusively(engine.model.path, run.output, reconstruct(run), run.engine.ranks)


def reconstruct(run: ReconstructionRun) -> Generator[Event, None, None]:
    """Carry out a reconstruction; yield its events."""
    similarity = Similarity()
    yield from map(Warned, run.result.warnings)
    yield from map(Noted, (*run.notes, *(() if run.video is None else run.video.notes)))
    yield RunPlanned(tuple(run.planned_stages()))
    source, expected = run.frames(), run.frames()  # the second for the comparison
    writer = _open_writer(run)
    with writer:
        for frames in run.parts:
            latents = yield from _encode(run, source, frames)
            yield from _decode(run, latents, expected, writer, similarity)
            del latents
        record = run.record(similarity)
        writer.metadata = record if run.request.embed_metadata else None
    yield Noted(f"{similarity}, to the frames that the VAE was given")
    width, height = run.geometry.decoded
    yield Finished(
        Video(
            path=writer.path,
            request=run.request,
            width=width,
            height=height,
            num_frames=run.num_frames,
            fps=run.fps,
            seed=0,
            warnings=tuple(run.result.warnings),
            timings=dict(run.result.seconds),
            memory=dict(run.result.memory),
            metadata=record,
            decoded=writer.frames if isinstance(writer, FramesInMemory) else None,
        )
    )


def _encode(
    run: ReconstructionRun, source: Iterator[np.ndarray], count: int
) -> Generator[Event, None, mx.array]:
    """Encode the next `count` frames to latents [1, T, h, w, C]."""
    import numpy as np

    chunks = run.chunks(count)
    pixels = (np.stack(list(islice(source, chunk.frames))) for chunk in chunks)
    health, found = Health(run.engine.precision, guidance=1), list[mx.array]()
    yield StageStarted("read", len(chunks))
    with run.loader.stage(run.plan.stage("read")) as stage:
        for each in encode_pixels(run.engine, stage.plan, pixels):
            health.check_media(each)
            found.append(each)
            yield StageProgress("read", len(found), len(chunks))
    yield run.result.add_stage(stage.meter)
    return mx.concatenate(found, axis=1)


def _decode(
    run: ReconstructionRun,
    latents: mx.array,
    expected: Iterator[np.ndarray],
    writer: FrameWriter,
    similarity: Similarity,
) -> Generator[Event, None, None]:
    """Decode latents, write the frames, and compare them with the next ones of `expected`."""
    import numpy as np

    engine, first = run.engine, writer.num_frames
    count = min(run.geometry.num_frames, run.num_frames - first)
    health = Health(engine.precision, guidance=1).frame_health()
    yield StageStarted("decode", count)
    with run.loader.stage(run.plan.stage("decode")) as stage:
        batch = MicroBatch(stage.plan.micro_batch or count)
        tiles = run.workload.vae_tiles
        for frames in decoded_frames(
            engine.model, engine.precision.vae, stage, batch, latents, count, tiles, health
        ):
            writer.write(frames)
            similarity.add(frames, np.stack(list(islice(expected, len(frames)))))
            yield StageProgress("decode", writer.num_frames - first, count)
            yield from shrink_if_over_budget(run.result, stage, batch.halve)
    yield run.result.add_stage(stage.meter)


def _open_writer(run: ReconstructionRun) -> FrameWriter:
    if run.output is None:
        return FramesInMemory()
    size, overwrite = run.geometry.decoded, run.request.overwrite
    return open_writer(run.output, *size, run.fps, overwrite=overwrite, check=False)


def _resolve_size(request: GenerationRequest, source: Size) -> Size:
    """Return the size of the frames: the source's by default, in whole cells of the VAE."""
    size = resolve_size(
        source,
        resolution=request.resolution,
        aspect_ratio=request.aspect_ratio,
        width=request.width,
        height=request.height,
    )
    return decoded_size(*check_size(*size))


def _resolve_frames(path: str, request: GenerationRequest, available: int) -> int:
    """Return the number of frames: all by default. Raises UsageError."""
    if request.num_frames is None:
        return available
    try:
        frames = get_num_frames(request.num_frames)
    except ValueError:
        frames = 0
    if not 1 <= frames <= available:
        raise UsageError(
            f"{path} has {available} frames, {str(request.num_frames)[:40]} were asked for.",
            f"Give --num-frames {available} or less.",
        )
    return frames


def _resolve_output(
    path: str, request: GenerationRequest, size: Size, num_frames: int, fps: float, model: str
) -> Path | None:
    """Return the output, None for frames in memory. Raises UsageError if it cannot be written."""
    if request.output is None:
        return None
    stem = Path(path).stem
    output = output_path(request.output, prompt=stem, seed=0, num_frames=num_frames, model=model)
    check_output(output, request.overwrite, num_frames=num_frames, size=size, fps=fps)
    check_inputs(output, [path])
    return output
