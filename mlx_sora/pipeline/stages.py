"""The stages of a run on one model: encode text, read media, denoise, decode.

Each builds its network, uses it and lets it go before the next one begins. A stage is a generator
of events whose value is what it made.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_sora.accel.cidl import BlockStream
from mlx_sora.conditioning.latents import ConditioningLatents, encode_tasks
from mlx_sora.distributed.group import Ranks
from mlx_sora.geometry import Size, latent_frames
from mlx_sora.loading.file_guard import WeightFileGuard
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import load_vae
from mlx_sora.loading.quantization import choose_quantization
from mlx_sora.memory.limits import StageMeter
from mlx_sora.memory.plan import StagePlan
from mlx_sora.memory.residency import BudgetMonitor
from mlx_sora.models.hooks import Hooks
from mlx_sora.models.stdit3 import BlockPair, STDiT3, STDiT3Config
from mlx_sora.models.vae import MicroBatch
from mlx_sora.pipeline.checkpoint import Snapshot
from mlx_sora.pipeline.networks import NetworkLoader
from mlx_sora.pipeline.run import GenerationRun
from mlx_sora.runtime.events import (
    Event,
    Noted,
    StageProgress,
    StageStarted,
    StepFinished,
    Warned,
)
from mlx_sora.sampling import SAMPLERS
from mlx_sora.sampling.base import Velocity
from mlx_sora.sampling.guidance import CFGSlice, Network, guided
from mlx_sora.sampling.loop import RestoredSteps, StepResult, denoise
from mlx_sora.sampling.noise import Noise
from mlx_sora.text.encoder import TextEncoder
from mlx_sora.video.frames import FrameWriter, to_uint8

if TYPE_CHECKING:
    import numpy as np

#: Prepared text to its states [n, D].
Texts = Mapping[str, mx.array]

#: The transformer, the stream of its blocks if they are streamed, and what watches its memory.
Transformer = tuple[STDiT3, BlockStream[BlockPair] | None, BudgetMonitor]


class Stages:
    """What a pipeline does with a run, one stage at a time."""

    model: ModelFolder

    def _lifetimes(self, run: GenerationRun) -> NetworkLoader:
        budget = run.settings.memory_budget
        model = choose_quantization(self.model, run.request.quantize)
        return NetworkLoader(model, run.dtype, budget, run.request.ci_dl or budget is not None)

    def _encode(
        self,
        runs: Sequence[GenerationRun],
        texts: MutableMapping[str, mx.array],
        also: Sequence[str] = (),
        ranks: Ranks | None = None,
    ) -> Generator[Event, None, None]:
        """Put the states of all texts of `runs` into `texts`; T5 is gone when this ends.

        The runs agree in number format, memory limits and checks. also: further texts of each.
        ranks: those that get the states from the first of them; the run's, unless given.
        """
        wanted = list(dict.fromkeys(t for run in runs for t in (*run.settings.all_texts, *also)))
        yield StageStarted("encode", len(wanted))
        run = max(runs, key=lambda run: run.plan.stage("encode").peak)
        ranks = ranks or run.ranks
        warnings: dict[str, Sequence[str]] = {}
        with StageMeter("encode") as meter, self._lifetimes(run).stage(run.plan.stage("encode")):
            with ranks.collective_errors():
                if ranks.is_rank0:
                    warnings = yield from self._encode_here(run, runs, wanted, texts)
            if ranks.size > 1:
                warnings = ranks.broadcast_object(warnings)
                for text in wanted:
                    states = ranks.broadcast(texts[text] if ranks.is_rank0 else None)
                    if not ranks.is_rank0:
                        texts[text] = states
        for each in runs:
            found = [line for text in (*each.settings.all_texts, *also) for line in warnings[text]]
            each.warnings += found
            yield from map(Warned, found)
            finished = each.close_stage(meter, len(runs))
        yield finished

    def _encode_here(
        self,
        run: GenerationRun,
        runs: Sequence[GenerationRun],
        wanted: Sequence[str],
        texts: MutableMapping[str, mx.array],
    ) -> Generator[Event, None, dict[str, Sequence[str]]]:
        """The texts' states by the T5 of `run`, and the warnings of each."""
        plan = run.plan.stage("encode")
        warnings: dict[str, Sequence[str]] = {}
        with self._lifetimes(run).text_encoder(plan) as (network, rows, blocks):
            encoder = TextEncoder(network, rows, run.tokenizer, run.dtype, blocks)
            for done, text in enumerate(wanted, start=1):
                encoded = encoder.encode(text)
                run.health.text(encoded.states)
                texts[text], warnings[text] = encoded.states, encoded.warnings
                yield StageProgress("encode", done, len(wanted))
            for each in runs:
                each.note_stream("encode", blocks)
        return warnings

    def _read(self, run: GenerationRun) -> Generator[Event, None, ConditioningLatents]:
        """Latents of the media that a run is given; the VAE's encoder is gone when this ends."""
        settings = run.settings
        channels = STDiT3Config.from_dict(self.model.config("transformer")).in_channels
        given = ConditioningLatents(settings.media, settings.geometry.latent, channels)
        todo = encode_tasks(settings.media, settings.geometry.size)
        if not todo:
            return given
        yield from map(Noted, settings.media.notes)
        yield StageStarted("read", len(todo))
        plan = run.plan.stage("read")
        with StageMeter("read") as meter, self._lifetimes(run).stage(plan):
            latents: Sequence[mx.array | None] = [None] * len(todo)
            with run.ranks.collective_errors():
                if run.ranks.is_rank0:
                    pictures = (task.read() for task in todo)
                    latents = yield from self._encoded(run, plan, pictures, len(todo))
            for task, each in zip(todo, latents, strict=True):
                given.fill(task, run.ranks.broadcast(each))
            del latents, each
        yield run.close_stage(meter)
        return given

    def _encoded(
        self, run: GenerationRun, plan: StagePlan, parts: Iterator[np.ndarray], count: int
    ) -> Generator[Event, None, list[mx.array]]:
        """Latents of `count` parts of media, uint8 [F, H, W, 3], each read when its turn comes."""
        made = list[mx.array]()
        with WeightFileGuard(self.model.vae).check_reads():
            vae = load_vae(self.model, ("encoder",))
            pixels = (mx.array(part).astype(mx.float32) / 127.5 - 1 for part in parts)
            encoded = vae.encode_chunks(pixels, plan.micro_batch, sequential_offload=plan.in_turn)
            del vae
            for latents in encoded:
                run.health.media(latents)
                made.append(latents)
                yield StageProgress("read", len(made), count)
        return made

    def _denoise(
        self, run: GenerationRun, texts: Texts, clip: int, given: ConditioningLatents
    ) -> Generator[Event, None, mx.array]:
        """Latents of a clip, [1, T, H, W, C]; the transformer is gone when this ends."""
        begun = run.begin_clip(clip)
        yield StageStarted("denoise", run.settings.steps)
        plan, lifetimes = run.plan.stage("denoise"), self._lifetimes(run)
        with StageMeter("denoise") as meter, lifetimes.stage(plan) as guard:
            with self._transformer(run) as (network, blocks), run.checkpoints.save_on_error():
                latents = yield from self._steps(
                    run, texts, (clip, begun), given, (network, blocks, guard)
                )
                run.note_stream("denoise", blocks)
            del network, blocks
        yield run.close_stage(meter)
        return latents

    @contextmanager
    def _transformer(
        self, run: GenerationRun
    ) -> Iterator[tuple[STDiT3, BlockStream[BlockPair] | None]]:
        """The transformer as Lifetimes opens it, on all ranks or on none."""
        with ExitStack() as opened:
            with run.ranks.collective_errors():
                opening = self._lifetimes(run).transformer(run.plan.stage("denoise"))
                found = opened.enter_context(opening)
            yield found

    def _steps(
        self,
        run: GenerationRun,
        texts: Texts,
        place: tuple[int, Snapshot | None],
        given: ConditioningLatents,
        transformer: Transformer,
    ) -> Generator[Event, None, mx.array]:
        """One event per step; the finished latents at the end. place: clip, what there is of it."""
        settings, geometry = run.settings, run.settings.geometry
        (network, blocks, guard), (clip, begun) = transformer, place
        velocity = self._velocity(run, texts, clip, (network, blocks))
        sampler = SAMPLERS[settings.sampler]
        times = sampler.timesteps(settings.steps, **settings.model_args.sizes)
        noise = Noise([settings.seed], (*geometry.latent, network.config.in_channels), clip)
        z, conditioning = given.begin(clip, noise)
        made = None
        if begun is not None and begun.latents is not None and begun.state is not None:
            z, made = begun.latents, RestoredSteps(begun.steps, begun.state)
        policy = run.accelerations.policy
        for done in denoise(
            velocity, z, times, sampler, policy=policy, conditioning=conditioning, restored=made
        ):
            z = done.z
            run.health.latents(z, done.step.index, done.step.total, given=conditioning is not None)
            yield from self._after(run, done, blocks)
            if blocks is not None:
                yield from warned(run, guard, blocks.shrink)
        yield from map(Noted, run.accelerations.summaries())
        return z

    def _velocity(
        self,
        run: GenerationRun,
        texts: Texts,
        clip: int,
        transformer: tuple[STDiT3, BlockStream[BlockPair] | None],
    ) -> Velocity:
        """The guided velocity of a clip."""
        settings, (network, blocks) = run.settings, transformer
        negative = None if settings.negative is None else texts[settings.negative]
        return guided(
            partial(bound, network, run, lambda i, t: run.accelerations.hooks(i, blocks)),
            [texts[settings.texts[clip]]],
            network.null_text if negative is None else lambda n: negative,
            settings.guidance,
            # Where halves are apart, each process has but one of them.
            sequential=run.request.sequential_guidance and run.division.cfg_degree == 1,
            policy=run.accelerations.guidance,
        )

    def _after(
        self, run: GenerationRun, done: StepResult, blocks: BlockStream[BlockPair] | None
    ) -> Generator[Event, None, None]:
        """What follows every step: accounts, and what is told."""
        index = done.step.index
        yield from run.step_made(done)
        merges = run.accelerations.merges_tokens
        if blocks is not None and merges(index) != merges(index + 1):
            blocks.remeasure()
        yield StepFinished(index, done.step.total, done.t, done.seconds, done.z)
        if run.previews is not None and run.ranks.is_rank0:
            yield from run.previews.after(index, done.x0)

    def _decode_clip(
        self, run: GenerationRun, clip: int, latents: mx.array, writer: FrameWriter
    ) -> Generator[Event, None, None]:
        """A clip's new frames, 17 at a time straight into the file; then the decoder is gone."""
        clips, plan = run.settings.clips, run.plan.stage("decode")
        skipped = clips.skipped(clip)
        frames, before = clips.num_frames - skipped, writer.num_frames
        yield StageStarted("decode", frames)
        with StageMeter("decode") as meter, self._lifetimes(run).stage(plan) as guard:
            # Chunks do not see each other: what the clip before has shown need not be decoded.
            new = latents[:, latent_frames(skipped) :]
            batch = MicroBatch(plan.micro_batch or frames)
            for chunk in self._frames(run, batch, new, (frames, plan.in_turn)):
                with run.ranks.collective_errors():
                    writer.write(chunk)
                yield StageProgress("decode", writer.num_frames - before, frames)
                yield from warned(run, guard, batch.halve)
            del chunk
        yield run.close_stage(meter)

    def _frames(
        self, run: GenerationRun, batch: MicroBatch, latents: mx.array, order: tuple[int, bool]
    ) -> Iterator[np.ndarray]:
        """The frames of latents chunk by chunk, uint8; ranks decode their chunks side by side.

        order: how many, and whether one decoder leaves before the other comes.
        """
        count, in_turn = order
        ranks, tiles = run.ranks, run.settings.vae_tiles
        with ranks.collective_errors():
            files, vae = WeightFileGuard(self.model.vae), load_vae(self.model)
        total = len(vae.chunks(count))
        own = slice(ranks.rank, None, ranks.size)
        chunks = vae.decode_chunks(
            latents, count, batch, sequential_offload=in_turn, tiles=tiles, chosen=own
        )
        del vae
        health = run.health.frames()
        for first in range(0, total, ranks.size):
            frames = None
            with ranks.collective_errors(), files.check_reads():
                if first + ranks.rank < total:
                    chunk = next(chunks)
                    health.add(chunk)
                    frames = to_uint8(chunk)
                    del chunk
            yield from frames_of(ranks, frames, run.settings.geometry.decoded)
        ranks.raise_if_all_fail(health.end)


def warned(run: GenerationRun, guard: BudgetMonitor, lessen: Callable[[], bool]) -> Iterator[Event]:
    """Take less memory from now on, by `lessen`, where a run has outgrown its budget."""
    warning = guard.check(lessen)
    if warning is not None:
        run.warnings.append(warning)
        yield Warned(warning)


def bound(
    network: STDiT3,
    run: GenerationRun,
    context: Callable[[int, mx.array], Hooks[BlockPair]],
    text: Sequence[mx.array],
    part: CFGSlice,
) -> Network:
    """The network for the video of `run` under one text [n, C] per sample, those of `part`.

    context: what fills the network's seams in a step (by index) at flow times t [B], but for the
    one around all blocks.
    """
    settings, told = run.settings, run.settings.model_args
    conditions = network.prepare(
        text, settings.geometry.latent, height=told.height, width=told.width, fps=told.fps
    )

    def velocity(z: mx.array, t: mx.array, x_mask: mx.array | None, index: int) -> mx.array:
        stack = run.accelerations.block_cache(index, part)
        seams = replace(context(index, t), block_cache=stack, sharding=run.layout)
        return network(z, t, conditions, x_mask, seams)

    return velocity


def frames_of(ranks: Ranks, own: np.ndarray | None, size: Size) -> Iterator[np.ndarray]:
    """Frames uint8 [n, H, W, 3] of all ranks, in their order; None from those that have none."""
    import numpy as np

    if ranks.size == 1:
        if own is not None:
            yield own
        return
    for data in ranks.all_gather_bytes(b"" if own is None else own.tobytes()):
        if data:
            yield np.frombuffer(data, np.uint8).reshape(-1, size.height, size.width, 3)
