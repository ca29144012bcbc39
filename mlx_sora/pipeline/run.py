"""One generation: the frozen plan of what will be done, and the small record of what was done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_sora.accel import Accelerations
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.accel.sequence_parallel import SequenceParallel
from mlx_sora.distributed.failure import Timeouts
from mlx_sora.distributed.group import Ranks
from mlx_sora.distributed.partition import ParallelPlan
from mlx_sora.errors import UsageError, WeightsError
from mlx_sora.geometry import MICRO_FRAME_SIZE, Size
from mlx_sora.memory.estimate import Estimate, estimate_from_speeds
from mlx_sora.memory.limits import StageMeter
from mlx_sora.memory.plan import MediaWorkload, Plan, Workload
from mlx_sora.memory.profiles import format_bytes
from mlx_sora.memory.speeds import MachineSpeeds
from mlx_sora.models.hooks import Sharding, Unsharded
from mlx_sora.models.ops import on_gpu
from mlx_sora.models.precision import dtype_name
from mlx_sora.models.vae import Chunk
from mlx_sora.pipeline.checkpoint import Checkpoints, Snapshot
from mlx_sora.pipeline.engine import Engine
from mlx_sora.pipeline.networks import NetworkLoader, Stage
from mlx_sora.pipeline.preview import Previews
from mlx_sora.pipeline.settings import ResolvedRequest
from mlx_sora.request.generation import GenerationRequest, label
from mlx_sora.runtime import blas
from mlx_sora.runtime.device import describe_device
from mlx_sora.runtime.events import Event, Noted, StageFinished, Warned
from mlx_sora.runtime.health import Health
from mlx_sora.sampling.loop import StepResult
from mlx_sora.text.cache import TextCache
from mlx_sora.text.prompt import split_directives
from mlx_sora.text.tokenizer import Encoding
from mlx_sora.utils.versions import versions
from mlx_sora.video import Video
from mlx_sora.video.metadata import build_metadata, without_folders

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

#: Operations per second that every GPU exceeds; an iPhone 15 Pro reaches three times as many.
SLOWEST_GPU = 2e11

#: Those that every CPU exceeds, even without a fast BLAS and beside other programs.
SLOWEST_CPU = 1e9


@dataclass(frozen=True)
class EditSource:
    """Source video of an edit, as far as planning goes.

    text: cleaned source prompt. inject_steps: first steps in which spatial attention uses the
    values of the inversion. captured: numbers that these values hold. media: the video's chunks.
    """

    text: str
    inject_steps: int
    captured: int
    media: MediaWorkload

    def add_to(self, workload: Workload, dtype: mx.Dtype) -> Workload:
        """Return the workload with reading and inversion of the video."""
        captured_bytes = self.captured * dtype.size
        return replace(workload, inversion=True, captured_bytes=captured_bytes, media=self.media)

    def parallel_plan(self, plan: ParallelPlan, mode: str) -> ParallelPlan:
        """Return the plan without CFG parallelism, under which a rank lacks injected values.

        mode: value of --parallel. Raises UsageError if it asks for CFG parallelism.
        """
        if not self.inject_steps or plan.cfg_degree == 1:
            return plan
        if mode != "auto":
            raise UsageError(
                f"--parallel {mode} cannot be combined with --inject-steps {self.inject_steps}.",
                "Use --parallel sequence, or --inject-steps 0.",
            )
        return ParallelPlan(plan.ranks)


@dataclass
class RunResult:
    """Record of a run so far.

    warnings: for the user and the metadata. clips: account of the accelerations, for each finished
    clip. seconds, memory: wall seconds and peak resident bytes per stage, over all clips. streamed:
    what block streams have read, by stage. metadata: further entries of the video's metadata.
    """

    warnings: list[str] = field(default_factory=list)
    clips: list[Mapping[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    streamed: dict[str, dict[str, Any]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def add_stream(self, stage: str, stream: BlockStream[Any] | None) -> None:
        """Add what a block stream did in `stage`; None if all blocks were resident."""
        if stream is None:
            return
        before = self.streamed.get(stage, {})
        done = {
            "loads": stream.stats.loads,
            "bytes_read": stream.stats.nbytes,
            "seconds_waited": stream.stats.wait_seconds,
        }
        self.streamed[stage] = {
            "blocks": len(stream.source),
            "resident": len(stream.resident),
            **{name: round(value + before.get(name, 0), 3) for name, value in done.items()},
        }
        text = ", ".join(f"{name} {value}" for name, value in self.streamed[stage].items())
        log.info("%s: streamed %s", stage, text)

    def add_stage(self, meter: StageMeter, runs: int = 1) -> StageFinished:
        """Add what a stage cost, and return its event. runs: number of runs that shared it."""
        usage = meter.usage
        assert usage is not None, "the meter's block has ended"
        stage = usage.stage
        self.seconds[stage] = self.seconds.get(stage, 0.0) + usage.seconds / runs
        self.memory[stage] = max(self.memory.get(stage, 0), usage.peak_rss)
        return StageFinished(stage, usage.seconds, usage.peak_memory, usage.peak_rss)


@dataclass(frozen=True)
class GenerationRun:
    """Plan of one generation: everything that is decided before weights are read.

    output: path of the video, None to hold its frames in memory. encodings: token ids of every
    text. accelerations: the techniques of the first clip; each later clip gets a fresh copy. plan:
    memory, reading and work per stage. notes: lines for the user at the start. weights: fingerprint
    of the model, if checkpoints are written. first_pass: the run whose frames this one enlarges.
    parts: of a first pass, the chunks of a clip that are decoded and then encoded together.
    """

    engine: Engine
    request: GenerationRequest
    settings: ResolvedRequest
    output: Path | None
    encodings: Mapping[str, Encoding]
    accelerations: Accelerations
    workload: Workload
    plan: Plan
    parallel: ParallelPlan
    previews: Previews | None = None
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    notes: tuple[str, ...] = ()
    weights: str | None = None
    result: RunResult = field(default_factory=RunResult)
    first_pass: GenerationRun | None = None
    parts: tuple[tuple[Chunk, ...], ...] = ()

    @property
    def ranks(self) -> Ranks:
        """Ranks that make the video together."""
        return self.engine.ranks

    @property
    def written_size(self) -> Size:
        """Pixels of the frames in the file."""
        return self.settings.geometry.decoded.enlarged(self.request.scale)

    @property
    def written(self) -> str:
        """Length, size and rate of the frames in the file, for people."""
        decoded, settings = self.settings.geometry.decoded, self.settings
        found = f"{settings.clips.total} frames of {self.written_size} pixels"
        if self.request.scale > 1:
            found += f" ({decoded}, enlarged {self.request.scale} times)"
        if settings.second_pass is not None:
            found += f", refined from {settings.second_pass.first_size}"
            found += f" in {settings.steps_to_make} of {settings.steps} steps"
        found += f", {settings.fps:g} per second"
        return f"{found}, in {settings.windows}" if settings.window_count > 1 else found

    @cached_property
    def health(self) -> Health:
        """Checks for results that cannot become a video."""
        engine, enabled = self.engine, self.request.health_check
        return Health(engine.precision, self.settings.guidance, enabled, engine.model.argument)

    @cached_property
    def text_cache(self) -> TextCache:
        """States of texts that were encoded before."""
        return self.engine.text_cache() if self.request.text_cache else TextCache(None, "")

    @cached_property
    def sharding(self) -> Sharding:
        """Division of the transformer's evaluations among the ranks; all ranks must ask for it."""
        if self.parallel.ranks == self.parallel.window_degree:
            return Unsharded()
        return SequenceParallel(self.ranks, self.parallel.cfg_degree)

    @cached_property
    def loader(self) -> NetworkLoader:
        """Opens the networks for one stage each."""
        engine, budget = self.engine, self.settings.memory_budget
        return NetworkLoader(engine.model, engine.precision, budget, self.request.ci_dl)

    @contextmanager
    def open_stage(self, name: str) -> Iterator[Stage]:
        """Open a stage; other ranks wait for its longest work between two signs of progress.

        Raises WeightsError if the weights are no longer those that checkpoints belong to.
        """
        if self.weights is not None and self.engine.fingerprint() != self.weights:
            raise WeightsError(
                f"The weights in {self.engine.model.path} were replaced during the run.",
                "Put the earlier ones back and start again, or delete the checkpoint.",
            )
        patience = self.ranks.allow_silence(self._seconds_per_sign(name), idle=on_gpu())
        with patience, self.loader.stage(self.plan.stage(name)) as stage:
            yield stage

    @property
    def on_block(self) -> Callable[[int], None] | None:
        """Sign of progress after each block of long passes; None without other ranks."""
        blocks, seconds = self.plan.stage("denoise").blocks, self._seconds_per_sign("denoise")
        if self.ranks.is_watched and blocks * seconds > Timeouts().idle:
            return lambda block: self.ranks.tick()
        return None

    def _seconds_per_sign(self, name: str) -> float:
        """Return the seconds that a slow machine needs from one sign to the next.

        Signs are the blocks of the transformer and the chunks of the VAE.
        """
        stage, work = self.plan.stage(name), self.workload
        signs = {
            "read": work.media.chunks if work.media else 1,
            "denoise": work.clips * work.block_passes * stage.blocks,
            "decode": work.clips * -(-work.geometry.num_frames // MICRO_FRAME_SIZE),
        }
        speed = SLOWEST_GPU if on_gpu() else SLOWEST_CPU
        return stage.flops / max(1, signs.get(name, 1)) / speed

    @property
    def has_steps_left(self) -> bool:
        """True unless a checkpoint holds the latents of all clips."""
        return self.finished_latents(self.settings.clips.count - 1) is None

    @property
    def passes(self) -> list[GenerationRun]:
        """The first pass, if there is one, and this."""
        return [self] if self.first_pass is None else [self.first_pass, self]

    def place(self, clip: int) -> int:
        """Return the index of a clip's denoising among those of all passes, for checkpoints."""
        return 2 * clip + (not self.parts) if self.first_pass or self.parts else clip

    def steps_done(self, clip: int) -> int:
        """Return the steps of an unfinished clip, of those to make, that were made before."""
        return max(0, self.checkpoints.steps_done(self.place(clip)) - self.settings.first_step)

    def finished_latents(self, clip: int) -> mx.array | None:
        """Return the latents of a clip whose steps were all made before, or None."""
        return self.checkpoints.finished(self.place(clip))

    def estimate(self, speeds: MachineSpeeds) -> Estimate:
        """Estimate the seconds of the run on the machine that has these speeds."""
        sizes = self.engine.sizes(encoders=self.workload.media is not None)
        precision = self.engine.precision
        texts = len(self.encodings) if self.plan.stage("encode").flops else 0
        first = self.first_pass
        plan = self.plan if first is None else self.plan.without(first.plan)
        found = estimate_from_speeds(sizes, self.workload, plan, speeds, precision, texts)
        return found if first is None else found.after(first.estimate(speeds))

    def opening_events(self) -> Iterator[Event]:
        """Yield the warnings and notes that preparation collected; log the details."""
        for line in self._details():
            log.info("%s", line)
        yield from map(Warned, dict.fromkeys(self.result.warnings))
        yield from map(Noted, self.notes)
        if self.previews is not None and self.has_steps_left:
            yield from map(Noted, self.previews.notes())

    def _details(self) -> Iterator[str]:
        """Yield what --verbose shows before the work, a line each."""
        engine, accelerations, device = self.engine, self.accelerations, describe_device()
        yield ", ".join(f"{name} {version}" for name, version in versions().items())
        yield f"device: {device['device']} ({device['backend']}) {device['blas_library']}"
        yield f"model: {engine.model.name} in {engine.model.path}"
        quantized = engine.quantization.get("quantization", {})
        for name, dtype in vars(engine.precision).items():
            yield f"{name}: {dtype_name(dtype)}, {quantized.get(name, 'not quantized')}"
        for name, config in self.settings.accelerations.items():
            if config is not None:
                yield f"{label(name)} {config}"
        for text, steps in (
            ("without blocks", accelerations.skipped_steps),
            ("without the unconditional prediction", accelerations.cond_only_steps),
            ("with merged tokens", filter(accelerations.token_merging, range(self.settings.steps))),
        ):
            made = (step for step in sorted(steps) if step >= self.settings.first_step)
            if numbers := " ".join(str(step + 1) for step in made):
                yield f"steps {text}: {numbers} of {self.settings.steps}"
        for stage in self.plan.stages:
            blocks = f", {stage.resident} of {stage.blocks} blocks resident" if stage.blocks else ""
            peak, read = format_bytes(stage.peak), format_bytes(stage.read)
            yield f"{stage.stage}: planned peak {peak}, {read} to read{blocks}"
        yield f"output: {self.output or 'in memory'}, {self.written}"

    def begin_clip(self, clip: int) -> tuple[Accelerations, Snapshot | None]:
        """Return the accelerations of a clip, and the state of it that a checkpoint holds."""
        accelerations = self.accelerations.fresh_copy() if clip else self.accelerations
        snapshot = self.checkpoints.restored(self.place(clip))
        if snapshot is not None and snapshot.state is not None:
            accelerations.restore(snapshot.state["accelerations"])
        return accelerations, snapshot

    def finish_step(self, step: StepResult, accelerations: Accelerations) -> Iterator[Event]:
        """Update accelerations and checkpoint after one step; the last one ends the clip."""
        index, total = step.step.index, step.step.total
        blas.adapt_threads()
        accelerations.on_step_end(step)
        self.checkpoints.set_warnings(self.result.warnings)
        is_last = step.is_leap or index + 1 == total
        if self.parallel.window_degree > 1 and (is_last or self.checkpoints.is_written):
            accelerations.share_windows(self.ranks)
        if is_last:
            yield from self.finish_clip(step.z, accelerations)
        else:
            state = {**step.state(), "accelerations": accelerations.state()}
            yield from self.checkpoints.finish_step(step.z, index + 1, state)

    def finish_clip(self, z: mx.array, accelerations: Accelerations) -> Iterator[Event]:
        """Record that a clip, or a pass of it, ended at z."""
        self.result.clips.append(accelerations.record())
        yield from self.checkpoints.finish_clip(z, self.result.clips[-1])

    def metadata(self) -> dict[str, Any]:
        """Return the video's metadata, as far as the run has come."""
        result = self.result
        record = build_metadata(
            self.request,
            self.settings.to_dict(),
            warnings=list(dict.fromkeys(result.warnings)),
            seconds=result.seconds,
            peak_memory=result.memory,
        )
        if self.first_pass is None:
            done = _account(result.clips or [self.accelerations.record()])
        else:  # whose accounts alternate with those of the second pass
            done = _account(result.clips[::2] or [self.first_pass.accelerations.record()])
            record["second_pass"] = _account(result.clips[1::2] or [self.accelerations.record()])
        if result.streamed:
            done["ci_dl"] = result.streamed
        if self.ranks.size > 1:
            record["parallel"] = {"ranks": self.ranks.size, "mode": self.parallel.mode}
        record |= {"device": describe_device(), "accelerations": done} | result.metadata
        return without_folders(record, self._paths())  # type: ignore[no-any-return]

    def _paths(self) -> list[str]:
        """Return the files and folders that the record may name, also as the prompt spells them."""
        request = self.request
        edited = self.result.metadata.get("edit", {}).get("video", "")
        in_prompt = split_directives(request.prompt)[1].reference_path or ""
        media = [file.path for file in self.settings.media.files]
        return [*media, *in_prompt.split(";"), edited, request.model or "", request.output or ""]

    def video(self, path: Path | None, frames: np.ndarray | None) -> Video:
        """Return the finished video, after the last stage."""
        settings, size = self.settings, self.written_size
        return Video(
            path=path,
            request=self.request,
            width=size.width,
            height=size.height,
            num_frames=settings.clips.total,
            fps=settings.fps,
            seed=settings.seed,
            warnings=tuple(dict.fromkeys(self.result.warnings)),
            timings=dict(self.result.seconds),
            memory=dict(self.result.memory),
            metadata=self.metadata(),
            decoded=frames,
        )


def _account(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the accelerations did: by name, in a list if there are several clips."""
    if len(clips) == 1:
        return dict(clips[0])
    return {name: [clip[name] for clip in clips] for name in clips[0]}
