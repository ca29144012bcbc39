"""Presets: options that belong together, for those that a request leaves open.

The figures are those of the bundled model (benchmarks/pareto.py: 30 steps, 17 frames). The modes
of a preset are given in flow time or as a rule, which all sizes share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Options by field of the request. Techniques that it does not name are off."""

    values: Mapping[str, Any]
    description: str


PRESETS = {
    "exact": Preset({}, "no approximation"),
    "balanced": Preset({"step_cache": "every:4,order=1"}, "2.2x the speed, PSNR 56 dB to exact"),
    "fast": Preset({"lpl": "t:220", "step_cache": "every:4,warmup=3"}, "4.3x, PSNR 43 dB"),
    "tiny-ram": Preset(
        {"sequential_guidance": True, "ci_dl": True},
        "exact, in the least memory: one block and one prediction of CFG at a time",
    ),
}
