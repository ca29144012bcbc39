"""What a run will need, before anything is loaded, and how to fit it into a budget.

Pure functions of shapes, configurations and the sizes in checkpoint headers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx

from mlx_sora.errors import MemoryBudgetError
from mlx_sora.geometry import MAX_TILES
from mlx_sora.memory.limits import memory_scope, return_freed_memory
from mlx_sora.memory.plan import Machine, ModelSizes, Plan, StagePlan, Workload
from mlx_sora.memory.profiles import format_bytes
from mlx_sora.memory.requirements import StageMemory, stage_requirements


def make_plan(
    sizes: ModelSizes,
    workload: Workload,
    machine: Machine,
    budget: int | None = None,
    *,
    streamed: bool = False,
) -> Plan:
    """The plan for `job`; with a `budget`, one whose every stage stays within it.

    Without one, all blocks are resident, or none if `streamed`. With one, blocks are streamed and
    as many stay as there is room for. Raises MemoryBudgetError naming the smallest that would do.
    """
    smallest = _smallest(sizes, workload, machine)
    free = stage_requirements(sizes, workload, machine, throttled=False)
    if budget is None:
        stages = [need.unbounded(machine, streamed) for need in free]
        return Plan(_repeated(stages, workload), None, smallest)
    stages = []
    for index, tight in enumerate(stage_requirements(sizes, workload, machine, throttled=True)):
        if tight.least > budget:
            raise _refusal(tight, budget, sizes, workload, machine)
        need = free[index] if free[index].comfortable <= budget else tight
        stages.append(need.fit(budget, machine))
    return Plan(_repeated(stages, workload), budget, smallest)


def _repeated(stages: Sequence[StagePlan], job: Workload) -> tuple[StagePlan, ...]:
    """The stages with the reading and the work of all clips: each reads the weights again."""
    frames, clips = job.geometry.num_frames, job.clips
    new = frames + (clips - 1) * (frames - job.shared_frames)
    work = {"denoise": clips, "decode": new / frames}
    return tuple(
        replace(stage, read=stage.read * clips, flops=int(stage.flops * work[stage.stage]))
        if stage.stage in work
        else stage
        for stage in stages
    )


@contextmanager
def stage_limits(stage: StagePlan) -> Iterator[None]:
    """Run a stage under the limits of its plan, without holes in the heap.

    Left alone, MLX's scheduler allocates for operations far ahead of the one that runs, which
    nearly doubles the peak. Where that does not fit it is held back, which keeps a core busy.
    """
    with return_freed_memory(), memory_scope(stage.cache_limit):
        previous = mx.set_memory_limit(stage.memory_limit)
        try:
            yield
        finally:
            mx.set_memory_limit(previous)


def _refusal(
    need: StageMemory, budget: int, model: ModelSizes, job: Workload, machine: Machine
) -> MemoryBudgetError:
    """Says which stage does not fit, and what would: another budget, or the first way around."""
    smallest = _smallest(model, job, machine)
    ways = {flags: _smallest(model, other, machine) for flags, other in _ways(job)}
    fix = f"Use --memory-budget {_option(smallest)} or more"
    fitting = [flags for flags, other in ways.items() if other <= budget]
    least = min(ways, key=lambda flags: ways[flags], default="")
    if fitting:
        fix += f", or {fitting[0]}"
    elif least and ways[least] < smallest:
        fix += f" ({_option(ways[least])} with {least})"
    return MemoryBudgetError(
        f"Stage {need.stage} needs {format_bytes(need.least)}, "
        f"the budget is {format_bytes(budget)}.",
        f"{fix}, or make a smaller video.",
    )


def _ways(job: Workload) -> Iterator[tuple[str, Workload]]:
    """The same video in less memory, by flags, the best pictures first; the last approximate."""
    apart = replace(job, sequential=True)
    if job.batch > 1:
        yield "--sequential-guidance", apart
    most = min(MAX_TILES, min(job.geometry.latent[1:]) // 2)
    for tiles in range(job.vae_tiles + 1, most + 1):
        yield f"--vae-tiles {tiles}", replace(job, vae_tiles=tiles)
    for tiles in range(job.vae_tiles + 1, most + 1):
        if job.batch > 1:
            yield f"--sequential-guidance --vae-tiles {tiles}", replace(apart, vae_tiles=tiles)


def _smallest(model: ModelSizes, job: Workload, machine: Machine) -> int:
    return max(need.least for need in stage_requirements(model, job, machine, throttled=True))


def _option(count: int) -> str:
    """Bytes as --memory-budget takes them."""
    return format_bytes(count).replace(" ", "")
