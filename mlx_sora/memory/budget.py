"""The memory budget of a run: given, of a device profile, or what this machine can spare."""

from __future__ import annotations

import mlx.core as mx

from mlx_sora.errors import UsageError
from mlx_sora.memory.limits import process_memory
from mlx_sora.memory.profiles import parse_bytes, profile_budget
from mlx_sora.runtime.device import backend, gpu_memory, total_memory
from mlx_sora.runtime.footprint import available_ram

AUTO, OFF = "auto", "off"

#: Share of the memory of the machine or its GPU that a run may take by itself. The rest is for the
#: system and the screen: Metal pages above its recommended working set.
_SHARE = 0.9


def resolve_budget(memory_budget: str | None, device_profile: str | None) -> int | None:
    """Return the bytes that the process may use; None without a budget.

    memory_budget: an amount, `auto` or `off`; None is `auto` on GPUs and `off` on CPUs. Raises
    UsageError for unknown values, for two budgets, and for `auto` where nothing can be measured.
    """
    if memory_budget is not None and device_profile is not None:
        raise UsageError("--memory-budget and --device-profile exclude each other.", "Give one.")
    if device_profile is not None:
        return profile_budget(device_profile)
    if memory_budget == OFF or (memory_budget is None and backend() == "cpu"):
        return None
    if memory_budget is not None and memory_budget != AUTO:
        try:
            return parse_bytes(memory_budget)
        except UsageError as error:
            raise UsageError(
                error.message, "Write it as 3.3GB or 800MB, or auto, or off."
            ) from None
    budget = automatic_budget()
    if budget is None and memory_budget == AUTO:
        raise UsageError(
            "This system does not tell how much memory is available.",
            "Use --memory-budget with an amount such as 8GB, or off.",
        )
    return budget


def is_automatic(memory_budget: str | None, device_profile: str | None) -> bool:
    """Return True if `resolve_budget` measures the machine, if it returns a budget at all."""
    return device_profile is None and memory_budget in (None, AUTO)


def automatic_budget() -> int | None:
    """Return 90 % of the memory of the GPU (else of the machine), or less if less is available.

    In bytes, for the whole process with what it holds already. None if the system does not tell.
    """
    available = available_memory()
    if available is None:
        return None
    return min(machine_capacity(), available)


def machine_capacity() -> int:
    """Return the bytes that a run may take by itself, when nothing else needs them."""
    return int(_SHARE * (gpu_memory() or total_memory()))


def available_memory() -> int | None:
    """Return the bytes that this process could hold now without others losing theirs."""
    if backend() == "cuda":  # memory of its own
        free = mx.device_info().get("free_memory")
        return None if free is None else int(free) + mx.get_active_memory() + mx.get_cache_memory()
    free = available_ram()
    return None if free is None else free + (process_memory() or 0)
