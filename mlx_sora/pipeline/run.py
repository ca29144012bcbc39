"""One generation on its way: what was decided, and what it has cost so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_sora.accel import Accelerations
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.accel.sequence_parallel import SequenceParallel
from mlx_sora.distributed.group import Ranks
from mlx_sora.distributed.partition import ParallelPlan
from mlx_sora.memory.limits import StageMeter
from mlx_sora.memory.plan import Plan, Workload
from mlx_sora.models.hooks import Sharding, Unsharded
from mlx_sora.pipeline.checkpoint import Snapshot
from mlx_sora.pipeline.preview import Previews
from mlx_sora.pipeline.resume import Checkpoints
from mlx_sora.pipeline.settings import ResolvedRequest
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.events import Event, Noted, StageFinished, Warned
from mlx_sora.runtime.health import Health
from mlx_sora.sampling.loop import StepResult
from mlx_sora.text.tokenizer import Tokenizer
from mlx_sora.video import Video
from mlx_sora.video.metadata import build_metadata

if TYPE_CHECKING:
    import numpy as np


@dataclass
class GenerationRun:
    """State of one generation.

    output: where the video goes, None to keep its frames. accelerations: what is at work in this
    run. plan: memory and reading, stage by stage. streamed: what streams of blocks have read, by
    stage. seconds, memory: per stage, wall seconds and peak of the resident set in bytes, over all
    clips. clips: what accelerations did in the clips whose steps are made.
    more: what else the metadata tell, for a task of its own. notes: what to tell the user at the
    start. checkpoints: what of the run is kept on disk meanwhile. previews: what is shown of it.
    """

    request: GenerationRequest
    settings: ResolvedRequest
    dtype: mx.Dtype
    output: Path | None
    accelerations: Accelerations
    tokenizer: Tokenizer
    plan: Plan
    warnings: list[str]
    ranks: Ranks = field(default_factory=Ranks)
    division: ParallelPlan = field(default_factory=lambda: ParallelPlan(1))
    work: Workload | None = None
    streamed: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    clips: list[Mapping[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    previews: Previews | None = None

    @property
    def health(self) -> Health:
        """The checks that were asked for."""
        return Health(self.dtype, self.settings.guidance, self.request.health_check)

    @cached_property
    def layout(self) -> Sharding:
        """How this process shares evaluations with the others; asked for by all of them."""
        return (
            Unsharded()
            if self.division.ranks == 1
            else SequenceParallel(self.ranks, self.division.cfg_degree)
        )

    @property
    def has_steps_left(self) -> bool:
        """Whether steps are left to be made."""
        return self.checkpoints.finished(self.settings.clips.count - 1) is None

    def begin(self) -> Iterator[Event]:
        """What is told at the start."""
        yield from map(Warned, self.warnings)
        yield from map(Noted, self.notes)

    def begin_clip(self, clip: int) -> Snapshot | None:
        """Accelerations at work in one clip know nothing of the next, but what was known before.

        The value is what an interrupted run made of the clip, if anything.
        """
        if clip:
            self.accelerations = self.accelerations.fresh_copy()
        begun = self.checkpoints.restored(clip)
        if begun is not None and begun.state is not None:
            self.accelerations.restore(begun.state["accelerations"])
        return begun

    def step_made(self, done: StepResult) -> Iterator[Event]:
        """Take account of a step; the last one of a clip ends it."""
        index, total = done.step.index, done.step.total
        self.accelerations.on_step_end(done)
        self.checkpoints.note_warnings(self.warnings)
        if done.leapt or index + 1 == total:
            self.clips.append(self.accelerations.record())
            yield from self.checkpoints.clip_made(done.z, self.clips[-1])
        else:
            state = {**done.state(), "accelerations": self.accelerations.state()}
            yield from self.checkpoints.step_made(done.z, index + 1, state)

    def note_stream(self, stage: str, stream: BlockStream[Any] | None) -> None:
        """Record what a stream of blocks did in `stage`; None where all blocks were in memory."""
        if stream is not None:
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

    def close_stage(self, meter: StageMeter, runs: int = 1) -> StageFinished:
        """Record what a stage cost, and the event that tells it. runs: how many shared it."""
        usage = meter.usage
        assert usage is not None, "the meter's block has ended"
        seconds, stage = usage.seconds / runs, usage.stage
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.memory[stage] = max(self.memory.get(stage, 0), usage.peak_rss)
        return StageFinished(stage, usage.seconds, usage.peak_memory, usage.peak_rss)

    def record(self) -> dict[str, Any]:
        """The metadata of the video, as far as the run has come."""
        record = build_metadata(
            self.request,
            self.settings.to_dict(),
            warnings=list(dict.fromkeys(self.warnings)),
            seconds=self.seconds,
            peak_memory=self.memory,
        )
        clips = self.clips or [self.accelerations.record()]
        done = dict(clips[0])
        if len(clips) > 1:
            done = {name: [clip[name] for clip in clips] for name in done}
        if self.streamed:
            done["ci_dl"] = self.streamed
        if self.ranks.size > 1:
            record["parallel"] = {"ranks": self.ranks.size, "mode": self.division.mode}
        return record | {"accelerations": done} | self.more

    def video(self, path: Path | None, frames: np.ndarray | None) -> Video:
        """The result, once all stages are over."""
        size = self.settings.geometry.decoded
        return Video(
            path=path,
            request=self.request,
            width=size.width,
            height=size.height,
            num_frames=self.settings.clips.total,
            fps=self.settings.fps,
            seed=self.settings.seed,
            warnings=tuple(dict.fromkeys(self.warnings)),
            timings=dict(self.seconds),
            memory=dict(self.memory),
            metadata=self.record(),
            frames=frames,
        )
