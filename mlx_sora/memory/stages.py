"""Memory of a stage, and the best plan for it within a budget.

All sizes are in bytes; peaks are those of the whole process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_sora.memory.activations import ExecutionMode
from mlx_sora.memory.limits import cache_limit, least_cache
from mlx_sora.memory.plan import Machine, StagePlan, VAESizes, WeightSizes
from mlx_sora.memory.residency import ResidencyPlan, choose_resident, evenly_spaced


@dataclass(frozen=True)
class BlockStageMemory:
    """Memory of a stage that runs a stack of blocks: text encoding or denoising.

    outside: memory outside MLX.
    fixed: MLX's, but for blocks, activations and cache.
    passes: passes through the blocks.
    reserve: part of the peak that the first pass does not show.
    largest_array: bytes of the largest activation.
    """

    stage: str
    outside: int
    fixed: int
    activations: int
    weights: WeightSizes
    passes: int
    flops: int
    mode: ExecutionMode
    reserve: int = 0
    largest_array: int = 0

    @property
    def minimum(self) -> int:
        """Bytes with one block in memory at a time."""
        least = self._used + least_cache(self.activations, gpu=self.mode.gpu)
        return least + self.weights.load_peak_bytes

    @property
    def comfortable(self) -> int:
        """Bytes from which the next block can be prefetched."""
        return self.minimum + max(self.weights.blocks)

    @property
    def _used(self) -> int:
        """Bytes without blocks and cache."""
        return self.outside + self.fixed + self.activations

    def plan_within(self, budget: int, machine: Machine, streamed: bool) -> StagePlan:
        """Plan the stage within `budget` bytes; blocks and cache share what is spare.

        streamed: no block is resident, even if it fits.
        """
        weights = self.weights
        available = budget - self._used
        spare = available - max(weights.blocks) - weights.load_peak_bytes
        cache = cache_limit(spare, self.activations, machine.cache_limit, gpu=self.mode.gpu)
        residency = choose_resident(available - cache, weights.blocks, weights.load_peak_bytes)
        if streamed or self.passes == 1:  # of one pass, no block would be used again
            residency = replace(residency, resident=0)
        return self._plan(residency, cache)

    def plan_unbounded(self, machine: Machine, streamed: bool) -> StagePlan:
        """Plan the stage without a budget."""
        resident = 0 if streamed else len(self.weights.blocks)
        cache = min(machine.cache_limit, self.activations)
        return self._plan(ResidencyPlan(resident, prefetch=streamed), cache)

    def _plan(self, residency: ResidencyPlan, cache: int) -> StagePlan:
        weights, size, count = self.weights, max(self.weights.blocks), len(self.weights.blocks)
        blocks = residency.resident * size
        if residency.resident < count:
            blocks += weights.load_peak_bytes + (size if residency.prefetch else 0)
        streamed_again = weights.stored_blocks * (count - residency.resident) // count
        mlx = self.fixed + blocks + self.activations
        return StagePlan(
            stage=self.stage,
            peak=self.outside + mlx + cache,
            read=weights.stored + (self.passes - 1) * streamed_again,
            flops=self.flops,
            cache_limit=cache,
            memory_limit=_memory_limit(mlx, self.activations, cache, self.mode),
            throttled=self.mode.throttled,
            blocks=count,
            resident=residency.resident,
            prefetch=residency.prefetch and residency.resident < count,
            reserve=self.reserve,
        )


@dataclass(frozen=True)
class VaeStageMemory:
    """Memory of decoding, or of encoding media (stage read).

    outside: memory outside MLX.
    spatial_activations: by frames per pass of the spatial VAE.
    queued_latents: latents of all chunks, which wait while the temporal decoder is offloaded.
    largest_array: bytes of the largest activation with one frame per pass.
    chunks: for each of which the layers of a streamed temporal decoder are read.
    """

    stage: str
    outside: int
    weights: VAESizes
    temporal_activations: int
    spatial_activations: Mapping[int, int]
    flops: int
    mode: ExecutionMode
    queued_latents: int = 0
    largest_array: int = 0
    chunks: int = 1

    @property
    def minimum(self) -> int:
        """Bytes with one frame per pass and one layer of the temporal decoder at a time."""
        return self._least(self._temporal_weights(None))

    @property
    def comfortable(self) -> int:
        """Bytes with one frame per pass: more are not faster, but streamed layers are slower."""
        return self._least(self.weights.temporal)

    def plan_within(self, budget: int, machine: Machine, streamed: bool) -> StagePlan:
        """Plan the stage within `budget` bytes, with as many frames per pass as fit.

        Of the two networks one is in memory at a time, streamed or not. Layers of the temporal
        decoder are streamed only if it does not fit.
        """
        available, gpu = budget - self.outside, self.mode.gpu
        layers = None
        if self.comfortable > budget:
            least = least_cache(self._activations(min(self.spatial_activations)), gpu=gpu)
            layers = self._choose_layers(available - least - self.queued_latents)
        temporal = self._temporal_weights(layers) if layers else self.weights.temporal
        frames = max(
            n
            for n in self.spatial_activations
            if n == 1
            or self._offloaded(n, temporal) + least_cache(self._activations(n), gpu=gpu)
            <= available
        )
        used = self._offloaded(frames, temporal)
        cache = cache_limit(
            available - used, self._activations(frames), machine.cache_limit, gpu=gpu
        )
        return self._plan(frames, used, cache, sequential_offload=True, layers=layers)

    def plan_unbounded(self, machine: Machine, streamed: bool) -> StagePlan:
        """Plan the stage without a budget; the networks are offloaded if `streamed`."""
        frames = max(self.spatial_activations)
        activations = self._activations(frames)
        used = self.weights.temporal + self.weights.spatial + activations
        if streamed:
            used = self._offloaded(frames, self.weights.temporal)
        cache = min(machine.cache_limit, activations)
        return self._plan(frames, used, cache, sequential_offload=streamed)

    def _activations(self, frames: int) -> int:
        """Bytes of the activations of the larger network."""
        return max(self.temporal_activations, self.spatial_activations[frames])

    def _least(self, temporal: int) -> int:
        """Bytes with one frame per pass and `temporal` bytes of weights of the temporal network."""
        frames = min(self.spatial_activations)
        least = least_cache(self._activations(frames), gpu=self.mode.gpu)
        return self.outside + least + self._offloaded(frames, temporal)

    def _offloaded(self, frames: int, temporal: int) -> int:
        """Bytes of MLX with one of the two networks in memory at a time."""
        return self.queued_latents + max(
            temporal + self.temporal_activations,
            self.weights.spatial + self.spatial_activations[frames],
        )

    def _temporal_weights(self, plan: ResidencyPlan | None) -> int:
        """Bytes of the temporal network's weights with streamed layers; None: as few as can be."""
        layers = self.weights.layers
        if layers is None:
            return self.weights.temporal
        resident, prefetch = (plan.resident, plan.prefetch) if plan else (0, False)
        streamed = layers.load_peak_bytes + prefetch * max(layers.blocks)
        return layers.rest + _evenly_spaced_bytes(layers.blocks, resident) + streamed

    def _choose_layers(self, available: int) -> ResidencyPlan | None:
        """Choose the layers that stay in memory, of `available` bytes; None without layers."""
        layers = self.weights.layers
        if layers is None:
            return None
        most = range(len(layers.blocks) if self.chunks > 1 else 1)
        plans = [ResidencyPlan(0, prefetch=False), *(ResidencyPlan(n, prefetch=True) for n in most)]
        available -= self.temporal_activations
        return [p for p in plans if p is plans[0] or self._temporal_weights(p) <= available][-1]

    def _plan(
        self,
        frames: int,
        used: int,
        cache: int,
        *,
        sequential_offload: bool,
        layers: ResidencyPlan | None = None,
    ) -> StagePlan:
        activations = min(self.temporal_activations, self.spatial_activations[frames])
        read, sizes = self.weights.stored, self.weights.layers
        if layers is not None and sizes is not None:
            kept = _evenly_spaced_bytes(sizes.blocks, layers.resident) / sum(sizes.blocks)
            read += int((self.chunks - 1) * sizes.stored_blocks * (1 - kept))
        return StagePlan(
            stage=self.stage,
            peak=self.outside + used + cache,
            read=read,
            flops=self.flops,
            cache_limit=cache,
            memory_limit=_memory_limit(used, activations, cache, self.mode),
            throttled=self.mode.throttled,
            blocks=len(sizes.blocks) if layers is not None and sizes is not None else 0,
            resident=layers.resident if layers is not None else 0,
            prefetch=layers is not None and layers.prefetch,
            micro_batch=frames,
            sequential_offload=sequential_offload,
        )


def _evenly_spaced_bytes(blocks: Sequence[int], count: int) -> int:
    """Return the bytes of `count` evenly spaced blocks of these sizes."""
    return sum(blocks[i] for i in evenly_spaced(len(blocks), count))


def _memory_limit(used: int, activations: int, cache: int, mode: ExecutionMode) -> int:
    """Return MLX's memory limit: what is used, less if the scheduler is to wait for memory.

    On GPUs it counts the cache, too: above it Metal frees cached buffers before it makes new ones.
    """
    limit = used - (activations // 2 if mode.throttled else 0)
    return limit + (cache if mode.gpu else 0)


StageMemory = BlockStageMemory | VaeStageMemory
