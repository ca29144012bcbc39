"""Accelerations from the text of their configs, as the command line has it."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_sora.accel import Accelerations
from mlx_sora.accel.base import ScheduleInfo
from mlx_sora.request.generation import options, technique_names


def make_accelerations(modes: Mapping[str, object], schedule: ScheduleInfo) -> Accelerations:
    """Return the techniques of `modes`, text by field of the request."""
    names = (name for name in technique_names() if name in modes)
    configs = {name: options()[name].parse(modes[name]) for name in names}
    return Accelerations(configs, schedule)
