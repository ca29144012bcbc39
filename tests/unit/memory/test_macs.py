"""Plans of the published model for Macs of every size: within memory, and within Metal's arrays."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mlx_sora.errors import MemoryBudgetError
from mlx_sora.geometry import RESOLUTIONS, Size, plan_geometry, resolve_size
from mlx_sora.memory.activations import largest_spatial_array
from mlx_sora.memory.estimate import published_sizes
from mlx_sora.memory.plan import HALF_SIZE, Machine, Plan, Workload
from mlx_sora.memory.planner import make_plan
from mlx_sora.memory.requirements import stage_requirements

SIZES = published_sizes(itemsize=2)


def mac(gigabytes: int) -> tuple[Machine, int]:
    """Return a Mac and its budget: 0.9 of Metal's working set, arrays up to three quarters of it.

    Macs with more memory allow somewhat less: 0.56 on an M2 Ultra.
    """
    working_set = (gigabytes << 30) * 2 // 3 if gigabytes <= 36 else (gigabytes << 30) * 3 // 4
    largest = int(working_set * (0.75 if gigabytes <= 16 else 0.56))
    return Machine(True, working_set, 2, largest_array=largest), working_set * 9 // 10


def workload(resolution: str, frames: int) -> Workload:
    size = resolve_size(Size(0, 0), resolution=resolution, aspect_ratio="16:9")
    return Workload(plan_geometry(size, frames), text_tokens=120, evaluations=30)


def check(plan: Plan, work: Workload, machine: Machine, budget: int) -> None:
    assert plan.peak <= budget
    for stage in stage_requirements(SIZES, work, machine, throttled=True):
        assert machine.can_allocate(stage.largest_array)
    decode = plan.stage("decode")
    assert decode.micro_batch is not None
    width = max(SIZES.vae.spatial.block_out_channels[:2])
    frames = largest_spatial_array(
        width, work.geometry.decoded, decode.micro_batch, tiles=work.vae_tiles
    )
    assert machine.can_allocate(frames)


def refusal(work: Workload, machine: Machine, budget: int) -> str:
    """Return what a refusal advises, or nothing for a plan that fits."""
    try:
        plan = make_plan(SIZES, work, machine, budget)
    except MemoryBudgetError as error:
        return error.fix
    check(plan, work, machine, budget)
    return ""


def with_flags(work: Workload, flags: str) -> Workload:
    tiles = re.search(r"--vae-tiles (\d+)", flags)
    return replace(
        work,
        sequential_guidance="--sequential-guidance" in flags,
        vae_tiles=int(tiles[1]) if tiles else 1,
        vae_itemsize=HALF_SIZE if "--vae-dtype" in flags else work.vae_itemsize,
    )


@pytest.mark.parametrize("gigabytes", [8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_plans_fit_or_say_what_would(gigabytes: int, resolution: str) -> None:
    machine, budget = mac(gigabytes)
    for frames in (1, 51, 102, 204, 408):
        work = workload(resolution, frames)
        fix = refusal(work, machine, budget)
        assert not fix or gigabytes < 64
        flags = re.match(r"Use (?:[^(]* or )?(--(?:sequential|vae)[^,]*)", fix)
        if flags is not None:
            assert not refusal(with_flags(work, flags[1]), machine, budget)
        else:
            assert not fix or "make a smaller video" in fix.lower()


def test_an_array_beyond_the_limit_is_refused_without_a_budget() -> None:
    work = workload("480p", 102)
    need = max(s.largest_array for s in stage_requirements(SIZES, work, mac(64)[0], throttled=True))
    machine = replace(mac(64)[0], largest_array=need)
    make_plan(SIZES, work, machine)
    with pytest.raises(MemoryBudgetError, match="needs an array of .* this GPU allows"):
        make_plan(SIZES, work, replace(machine, largest_array=need - 1))


def test_cuda_is_planned_without_throttling() -> None:
    """Its scheduler runs ahead of a memory limit: measured on an H200 with MLX 0.32.4."""
    machine, work = mac(64)[0], workload("480p", 102)
    cuda = replace(machine, can_throttle=False)
    budget = make_plan(SIZES, work, machine).smallest
    assert any(stage.throttled for stage in make_plan(SIZES, work, machine, budget).stages)
    with pytest.raises(MemoryBudgetError):
        make_plan(SIZES, work, cuda, budget)
    plan = make_plan(SIZES, work, cuda, make_plan(SIZES, work, cuda).smallest)
    assert not any(stage.throttled for stage in plan.stages)


def test_frames_per_pass_follow_the_largest_array() -> None:
    machine, work = mac(128)[0], workload("720p", 51)
    assert make_plan(SIZES, work, machine).stage("decode").micro_batch == 4
    width = max(SIZES.vae.spatial.block_out_channels[:2])
    least = largest_spatial_array(width, work.geometry.decoded, 4) - 1
    machine = replace(machine, largest_array=least)
    assert make_plan(SIZES, work, machine).stage("decode").micro_batch == 2
