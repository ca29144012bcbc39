"""Networks for one stage each: in memory whole, or streamed block by block, as the plan says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from mlx_sora.accel.cidl import BlockStream
from mlx_sora.loading.blocks import BlockSource
from mlx_sora.loading.file_guard import WeightFileGuard, eval_parameters, retry_read
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import (
    ReadRows,
    load_text_encoder,
    load_transformer,
    stream_text_encoder,
    stream_transformer,
)
from mlx_sora.memory.limits import memory_scope
from mlx_sora.memory.plan import StagePlan
from mlx_sora.memory.planner import stage_limits
from mlx_sora.memory.residency import BudgetMonitor, Residency
from mlx_sora.models.stdit3 import BlockPair, STDiT3
from mlx_sora.models.t5 import T5Block, T5Encoder
from mlx_sora.runtime.device import known_error


@dataclass(frozen=True)
class NetworkLoader:
    """Opens networks of `model` in `dtype`. budget: bytes for the whole process, if there is one.

    streamed: blocks come from disk while others compute, even without a budget.
    """

    model: ModelFolder
    dtype: mx.Dtype
    budget: int | None = None
    streamed: bool = False

    @contextmanager
    def stage(self, plan: StagePlan) -> Iterator[BudgetMonitor]:
        """Memory limits of one stage; what it used is given back when it ends.

        MLX's errors about memory and time come out as MlxSoraErrors.
        """
        with memory_scope() if self.budget is None else stage_limits(plan):
            try:
                yield BudgetMonitor(plan.stage, self.budget)
            except (RuntimeError, MemoryError) as error:
                known = known_error(error, plan.stage)
                if known is None:
                    raise
                raise known from error

    @contextmanager
    def text_encoder(
        self, plan: StagePlan
    ) -> Iterator[tuple[T5Encoder, ReadRows, BlockStream[T5Block] | None]]:
        """T5, the reader of its embedding rows, and the stream of its blocks where there is one."""
        if not self.streamed:
            with WeightFileGuard(self.model.text_encoder).check_reads():
                yield *retry_read(self._text_encoder, "the text encoder"), None
            return
        network, rows, source = stream_text_encoder(self.model, self.dtype)
        # One pass: a block that stays would never be used again.
        with BlockStream(source, 0, prefetch=plan.prefetch) as stream:
            yield network, rows, stream

    @contextmanager
    def transformer(
        self, plan: StagePlan
    ) -> Iterator[tuple[STDiT3, BlockStream[BlockPair] | None]]:
        """The transformer, and the stream of its block pairs where there is one."""
        if not self.streamed:
            with WeightFileGuard(self.model.transformer).check_reads():
                network = retry_read(self._transformer, "the transformer")
            yield network, None
            return
        network, source = stream_transformer(self.model, self.dtype)
        with self._cyclic(source, plan) as stream:
            yield network, stream

    def _text_encoder(self) -> tuple[T5Encoder, ReadRows]:
        network, rows = load_text_encoder(self.model, self.dtype)
        eval_parameters(network)
        return network, rows

    def _transformer(self) -> STDiT3:
        network = load_transformer(self.model, self.dtype)
        eval_parameters(network)
        return network

    def _cyclic(self, source: BlockSource[BlockPair], plan: StagePlan) -> BlockStream[BlockPair]:
        """A stream for many passes; within a budget, what stays is decided by measuring."""
        if self.budget is None:
            return BlockStream(source, plan.resident, cyclic=True, prefetch=plan.prefetch)
        residency = Residency(
            self.budget,
            cache_limit=plan.cache_limit,
            reserve=plan.reserve,
            throttled=plan.throttled,
        )
        return BlockStream(source, residency, cyclic=True)
