"""Plan a run before anything is loaded, and fit it into a memory budget.

Pure functions of shapes, configurations and the sizes in checkpoint headers, and the scope that
applies a stage's plan to MLX.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

from mlx_sora.errors import MemoryBudgetError
from mlx_sora.geometry import MAX_TILES
from mlx_sora.memory.limits import (
    memory_scope,
    restore_memory_limit,
    return_freed_memory,
    set_memory_limit,
)
from mlx_sora.memory.plan import HALF_SIZE, Machine, ModelSizes, Plan, StagePlan, Workload
from mlx_sora.memory.profiles import format_bytes
from mlx_sora.memory.requirements import stage_requirements
from mlx_sora.memory.stages import StageMemory


class LargeArrayError(MemoryBudgetError):
    """An array that the GPU cannot allocate, with any budget."""


def make_plan(
    sizes: ModelSizes,
    workload: Workload,
    machine: Machine,
    budget: int | None = None,
    *,
    streamed: bool = False,
) -> Plan:
    """Plan every stage of `workload`, each within `budget` bytes of the process.

    Without a budget all blocks are resident; with one, as many as fit; none if `streamed`. Raises
    MemoryBudgetError that names the smallest budget.
    """
    smallest = _smallest_budget(sizes, workload, machine)
    unthrottled = stage_requirements(sizes, workload, machine, throttled=False)
    for stage in unthrottled:
        if not machine.can_allocate(stage.largest_array):
            raise _array_error(stage, budget, sizes, workload, machine)
    if budget is None:
        stages = [stage.plan_unbounded(machine, streamed) for stage in unthrottled]
        return Plan(_scale_to_clips(stages, workload), None, smallest)
    stages = []
    throttled = stage_requirements(sizes, workload, machine, throttled=True)
    for free, tight in zip(unthrottled, throttled, strict=True):
        if tight.minimum > budget:
            raise _budget_error(tight, budget, sizes, workload, machine)
        stage = free if free.comfortable <= budget else tight
        stages.append(stage.plan_within(budget, machine, streamed))
    return Plan(_scale_to_clips(stages, workload), budget, smallest)


def _scale_to_clips(stages: Sequence[StagePlan], workload: Workload) -> tuple[StagePlan, ...]:
    """Multiply reading and operations by the number of clips: each reads the weights again.

    Windows share what was read, but for streamed blocks, which count as passes of the stage.
    """
    frames, clips = workload.geometry.num_frames, workload.clips
    factors = {"denoise": clips, "decode": workload.num_frames / frames}
    reads = 1 if workload.windowed else clips
    if workload.vae_only:  # whose parts are read in turn; the media's chunks are those of all
        factors["read"] = 1
    return tuple(
        replace(stage, read=stage.read * reads, flops=int(stage.flops * factors[stage.stage]))
        if stage.stage in factors
        else stage
        for stage in stages
    )


@contextmanager
def stage_limits(stage: StagePlan) -> Iterator[None]:
    """Apply the memory limits of a stage's plan to MLX and to malloc, then restore them.

    Without a memory limit, MLX's scheduler allocates far ahead of the running operation, which
    nearly doubles the peak. A throttled stage allocates less, and keeps a core busy waiting.
    """
    with return_freed_memory(), memory_scope(stage.cache_limit):
        previous = set_memory_limit(stage.memory_limit)
        try:
            yield
        finally:
            restore_memory_limit(previous)


def _array_error(
    stage: StageMemory,
    budget: int | None,
    sizes: ModelSizes,
    workload: Workload,
    machine: Machine,
) -> LargeArrayError:
    """Name the stage with an array that the GPU cannot allocate, and an option that would do."""
    fitting = [
        flags
        for flags, smaller in _allocatable_workloads(sizes, workload, machine)
        if budget is None or _smallest_budget(sizes, smaller, machine) <= budget
    ]
    return LargeArrayError(
        f"Stage {stage.stage} needs an array of {format_bytes(stage.largest_array)}, "
        f"this GPU allows {format_bytes(machine.largest_array or 0)}.",
        f"Use {fitting[0]}, or make a smaller video." if fitting else "Make a smaller video.",
    )


def _allocatable_workloads(
    sizes: ModelSizes, workload: Workload, machine: Machine
) -> Iterator[tuple[str, Workload]]:
    """Yield the smaller workloads whose arrays the machine can allocate, with their flags."""
    for flags, smaller in _smaller_workloads(workload, machine):
        stages = stage_requirements(sizes, smaller, machine, throttled=True)
        if all(machine.can_allocate(stage.largest_array) for stage in stages):
            yield flags, smaller


def _budget_error(
    stage: StageMemory, budget: int, sizes: ModelSizes, workload: Workload, machine: Machine
) -> MemoryBudgetError:
    """Name the stage that does not fit, and a budget or the first options that would do."""
    smallest = _smallest_budget(sizes, workload, machine)
    needed = {
        flags: _smallest_budget(sizes, smaller, machine)
        for flags, smaller in _allocatable_workloads(sizes, workload, machine)
    }
    fix = f"Use --memory-budget {_flag_value(smallest)} or more"
    fitting = [flags for flags, other in needed.items() if other <= budget]
    least = min(needed, key=lambda flags: needed[flags], default="")
    if fitting:
        fix += f", or {fitting[0]}"
    elif least and needed[least] < smallest:
        fix += f" ({_flag_value(needed[least])} with {least})"
    return MemoryBudgetError(
        f"Stage {stage.stage} needs {format_bytes(stage.minimum)}, "
        f"the budget is {format_bytes(budget)}.",
        f"{fix}, or make a smaller video.",
    )


def _smaller_workloads(workload: Workload, machine: Machine) -> Iterator[tuple[str, Workload]]:
    """Yield flags that need less memory, and their workload: exact ones first, best quality first.

    Half precision, which is for GPUs, and VAE tiles are approximate.
    """
    most = min(MAX_TILES, min(workload.geometry.latent[1:]) // 2)
    sequential, half, tiles = (
        [("--sequential-guidance", {"sequential_guidance": True})] * (workload.batch > 1),
        [("--vae-dtype bfloat16", {"vae_itemsize": HALF_SIZE})]
        * (machine.gpu and workload.vae_itemsize > HALF_SIZE),
        [(f"--vae-tiles {n}", {"vae_tiles": n}) for n in range(workload.vae_tiles + 1, most + 1)],
    )
    for options in (
        (sequential,),
        (half,),
        (sequential, half),
        (tiles,),
        (sequential, tiles),
        (half, tiles),
        (sequential, half, tiles),
    ):
        for chosen in product(*options):
            changes = {name: value for _, change in chosen for name, value in change.items()}
            yield " ".join(flags for flags, _ in chosen), replace(workload, **changes)


def _smallest_budget(sizes: ModelSizes, workload: Workload, machine: Machine) -> int:
    stages = stage_requirements(sizes, workload, machine, throttled=True)
    return max(stage.minimum for stage in stages)


def _flag_value(count: int) -> str:
    """Format bytes as --memory-budget takes them."""
    return format_bytes(count).replace(" ", "")
