"""Accelerations from the text of their configs, as the command line has it."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_sora.accel import Accelerations
from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.request.generation import options


def make_accelerations(modes: Mapping[str, object], schedule: ScheduleInfo) -> Accelerations:
    """Return the techniques of `modes`, text by field of the request."""
    configs = {name: options()[name].parse(mode) for name, mode in modes.items()}
    return Accelerations(configs, schedule)
