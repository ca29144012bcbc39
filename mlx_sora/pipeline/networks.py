"""Opening the networks of a run, whole or streamed block by block, for one stage each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx import nn

from mlx_sora.accel import Accelerations
from mlx_sora.accel.cidl import BlockStream
from mlx_sora.geometry import ModelArguments
from mlx_sora.loading.blocks import BlockSource
from mlx_sora.loading.file_guard import WeightFileGuard, eval_parameters, retry_read
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import (
    ReadRows,
    load_text_encoder,
    load_transformer,
    load_vae,
    stream_decoder,
    stream_text_encoder,
    stream_transformer,
)
from mlx_sora.memory.limits import StageMeter, memory_scope, wired_memory
from mlx_sora.memory.plan import StagePlan
from mlx_sora.memory.planner import stage_limits
from mlx_sora.memory.residency import BudgetMonitor, Residency
from mlx_sora.models.hooks import Sharding, ValueSharing
from mlx_sora.models.precision import Precision
from mlx_sora.models.stdit3 import BlockPair, Conditions, STDiT3
from mlx_sora.models.t5 import T5Block, T5Encoder
from mlx_sora.models.text_segments import SegmentedText, Text
from mlx_sora.models.vae import MicroBatch, OpenBlocks, VideoVAE
from mlx_sora.pipeline.settings import ResolvedRequest, latent_shares
from mlx_sora.runtime import blas
from mlx_sora.runtime.device import explain_device_error
from mlx_sora.runtime.health import FrameHealth
from mlx_sora.sampling.guidance import CFGSlice
from mlx_sora.video.frames import to_uint8

if TYPE_CHECKING:
    import numpy as np

#: The transformer, and the stream of its block pairs (None if they are resident).
StreamedTransformer = tuple[STDiT3, BlockStream[BlockPair] | None]

#: The transformer, and where to read its block pairs (None if they are loaded).
_LoadedTransformer = tuple[STDiT3, BlockSource[BlockPair] | None]


@dataclass(frozen=True)
class Stage:
    """An open stage: its plan, the meter of its cost and the monitor of its memory budget."""

    plan: StagePlan
    meter: StageMeter
    monitor: BudgetMonitor


@dataclass(frozen=True)
class NetworkLoader:
    """Opens networks of `model` in the types of `precision`.

    budget: bytes for the whole process, or None; within it, as many blocks are resident as fit.
    streamed: none is, even if it fits.
    """

    model: ModelFolder
    precision: Precision
    budget: int | None = None
    streamed: bool = False

    @contextmanager
    def stage(self, plan: StagePlan) -> Iterator[Stage]:
        """Measure a stage and hold it to its memory limits; free its memory when it ends.

        Raises MLX's errors about memory and time as MlxSoraErrors.
        """
        blas.adapt_threads()
        limits = memory_scope(plan.cache_limit) if self.budget is None else stage_limits(plan)
        wired = wired_memory(plan.memory_limit) if plan.is_resident else nullcontext()
        with StageMeter(plan.stage) as meter, limits, wired:
            try:
                yield Stage(plan, meter, BudgetMonitor(plan.stage, self.budget))
                mx.synchronize()  # a GPU's errors come out here, not in the next stage
            except (RuntimeError, MemoryError) as error:
                known = explain_device_error(error, plan.stage)
                if known is None:
                    raise
                raise known from error

    @contextmanager
    def text_encoder(
        self, plan: StagePlan
    ) -> Iterator[tuple[T5Encoder, ReadRows, BlockStream[T5Block] | None]]:
        """Open T5, the reader of its embedding rows, and the stream of its blocks, if streamed."""
        if self._is_whole:
            with WeightFileGuard(self.model.text_encoder).check_reads():
                yield *retry_read(self._text_encoder, "the text encoder"), None
            return
        with WeightFileGuard(self.model.text_encoder).check_reads():
            streamed = retry_read(self._streamed_text_encoder, "the text encoder")
        network, rows, source = streamed
        # One pass: a resident block would never be used again.
        with BlockStream(source, 0, prefetch=plan.prefetch) as stream:
            yield network, rows, stream

    @contextmanager
    def transformer(self, plan: StagePlan) -> Iterator[StreamedTransformer]:
        """Open the transformer, and the stream of its block pairs, if streamed."""
        load = self._transformer if self._is_whole else self._streamed_transformer
        with WeightFileGuard(self.model.transformer).check_reads():
            network, source = retry_read(load, "the transformer")
        if source is None:
            yield network, None
            return
        with self._cyclic_stream(source, plan) as stream:
            yield network, stream

    @property
    def _is_whole(self) -> bool:
        return self.budget is None and not self.streamed

    def _text_encoder(self) -> tuple[T5Encoder, ReadRows]:
        network, rows = load_text_encoder(self.model, self.precision.text_encoder)
        eval_parameters(network)
        return network, rows

    def _transformer(self) -> _LoadedTransformer:
        network = load_transformer(self.model, self.precision.transformer)
        eval_parameters(network)
        return network, None

    def _streamed_text_encoder(self) -> tuple[T5Encoder, ReadRows, BlockSource[T5Block]]:
        network, rows, source = stream_text_encoder(self.model, self.precision.text_encoder)
        eval_parameters(network)  # what no block holds
        return network, rows, source

    def _streamed_transformer(self) -> _LoadedTransformer:
        network, source = stream_transformer(self.model, self.precision.transformer)
        eval_parameters(network)
        return network, source

    def _cyclic_stream(
        self, source: BlockSource[BlockPair], plan: StagePlan
    ) -> BlockStream[BlockPair]:
        """Make a stream for many passes; within a budget, measuring decides what is resident."""
        if self.budget is None or self.streamed:
            return BlockStream(source, plan.resident, cyclic=True, prefetch=plan.prefetch)
        residency = Residency(
            self.budget,
            cache_limit=plan.cache_limit,
            reserve=plan.reserve,
            throttled=plan.throttled,
        )
        return BlockStream(source, residency, cyclic=True)


@dataclass(frozen=True)
class ClipTransformer:
    """The transformer with the sizes and hooks of one clip; fills `TextConditionedModel`.

    latent: T, H, W. value_sharing: from step and flow time to the hook of an edit, or None.
    inverted_steps: N if the flow is inverted; step i then has the hooks of step N - 1 - i.
    on_block: called after each block pair is computed.
    """

    transformer: StreamedTransformer
    model_args: ModelArguments
    latent: Sequence[int]
    accelerations: Accelerations
    sharding: Sharding
    value_sharing: Callable[[int, float], ValueSharing | None] | None = None
    inverted_steps: int | None = None
    on_block: Callable[[int], None] | None = None

    def prepare(self, text: Sequence[Text]) -> Conditions:
        """Encode what all steps share: text, position, frame rate."""
        args = self.model_args
        return self.transformer[0].prepare(
            text, self.latent, height=args.height, width=args.width, fps=args.fps
        )

    def __call__(
        self,
        z: mx.array,
        t: mx.array,
        conditions: Conditions,
        x_mask: mx.array | None,
        step: int,
        cfg_slice: CFGSlice,
        /,
    ) -> mx.array:
        """Predict [b, T, H, W, out_channels] at z [b, T, H, W, C] and flow times t [b]."""
        network, blocks = self.transformer
        values = self.value_sharing
        if self.inverted_steps is not None:
            step = self.inverted_steps - 1 - step
        hooks = replace(
            self.accelerations.hooks(step, blocks),
            block_cache=self.accelerations.block_cache(step, cfg_slice),
            sharding=self.sharding,
            value_sharing=None if values is None else values(step, _first(t)),
            on_block=self.on_block,
        )
        return network(z, t, conditions, x_mask, hooks)


def clip_text(settings: ResolvedRequest, clip: int, texts: Mapping[str, mx.array]) -> Text:
    """Return the text of a clip, or its segments. texts: states [n, C_text] by text."""
    text = settings.texts[clip]
    segments = settings.segments.get(text)
    if segments is None:
        return texts[text]
    shares = latent_shares(segments, settings.geometry.num_frames)
    return SegmentedText(tuple(texts[segment.text] for segment in segments), shares)


def _first(t: mx.array) -> float:
    return float(t[0].item())  # type: ignore[arg-type]


def load_decoder(
    model: ModelFolder,
    dtype: mx.Dtype,
    plan: StagePlan,
    on_close: Callable[[str, BlockStream[nn.Module]], None] = lambda stage, stream: None,
) -> tuple[VideoVAE, OpenBlocks]:
    """Load the VAE's decoder, and what opens the stream of its layers, if `plan` has any.

    on_close: called with the stream when all chunks have passed it.
    """
    if not plan.blocks:
        return load_vae(model, dtype=dtype), nullcontext
    vae, source = stream_decoder(model, dtype)

    @contextmanager
    def open_blocks() -> Iterator[BlockStream[nn.Module]]:
        with BlockStream(source, plan.resident, cyclic=True, prefetch=plan.prefetch) as stream:
            yield stream
        on_close(plan.stage, stream)

    return vae, open_blocks


def decoded_frames(
    model: ModelFolder,
    dtype: mx.Dtype,
    stage: Stage,
    batch: MicroBatch,
    latents: mx.array,
    count: int,
    tiles: int,
    health: FrameHealth,
) -> Iterator[np.ndarray]:
    """Decode latents to `count` frames on one process; yield uint8 [n, H, W, 3] at a time."""
    with WeightFileGuard(model.vae).check_reads():
        vae, open_blocks = load_decoder(model, dtype, stage.plan)
        chunks = vae.decode_chunks(
            latents,
            count,
            batch,
            sequential_offload=stage.plan.sequential_offload,
            open_blocks=open_blocks,
            tiles=tiles,
        )
        del vae
        for chunk in chunks:
            health.add(chunk)
            frames = to_uint8(chunk)
            del chunk
            yield frames
