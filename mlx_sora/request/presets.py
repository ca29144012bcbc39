"""Presets: options that belong together, for those that a request leaves open.

The figures are those of the bundled model (benchmarks/pareto.py: 30 steps, 17 frames); where a
preset is approximate, its parts are given in flow time or as a rule, which other sizes share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_sora.request.generation import GenerationRequest


@dataclass(frozen=True)
class Preset:
    """values: by field of the request. says: what to expect, for the help."""

    values: Mapping[str, Any]
    says: str


#: Every approximation, off.
_EXACT = dict.fromkeys(("lpl", "tdtm", "step_cache", "guidance_interval", "guidance_cache"), "off")

PRESETS = {
    "exact": Preset(_EXACT, "no approximation"),
    "balanced": Preset(
        _EXACT | {"step_cache": "every:4,order=1"}, "2.5x the speed, 58 dB to exact"
    ),
    "fast": Preset(_EXACT | {"lpl": "t:220", "step_cache": "every:4,warmup=3"}, "4.6x, 42 dB"),
    "tiny-ram": Preset(
        _EXACT | {"sequential_guidance": True, "ci_dl": True},
        "exact, one block and one half of guidance in memory at a time",
    ),
}

PRESET_HELP = "fill the options left open: " + "; ".join(
    f"{name} ({preset.says})" for name, preset in PRESETS.items()
)


def filled(request: GenerationRequest) -> GenerationRequest:
    """The request with what its preset says of options that it leaves open."""
    if request.preset is None:
        return request
    values = PRESETS[request.preset].values
    left_open = {name: v for name, v in values.items() if getattr(request, name) in (None, False)}
    return replace(request, **left_open)
