"""mlx_sora: Open-Sora 1.2 text-to-video on Apple MLX.

Importing it is light: networks, MLX and file formats load on first use. Two things are done at
once, as they only work before MLX is used: a fast BLAS on Linux, and defaults of MLX's switches.
"""

from __future__ import annotations

import signal
import sys

# Ctrl-C while `python -m mlx_sora` loads ends it without a traceback; __main__.py handles it again.
if (
    sys.argv[:1] == ["-m"]
    and "mlx_sora" in sys.orig_argv
    and signal.getsignal(signal.SIGINT) == signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from importlib import import_module
from typing import TYPE_CHECKING

from mlx_sora.errors import MemoryBudgetError, MlxSoraError, NumericsError, UsageError, WeightsError
from mlx_sora.runtime import blas as _blas
from mlx_sora.runtime import switches as _switches

if TYPE_CHECKING:
    from mlx_sora.pipeline import Pipeline
    from mlx_sora.request.generation import GenerationRequest
    from mlx_sora.request.techniques import GuidanceCache, GuidanceInterval, Lpl, StepCache, Tdtm
    from mlx_sora.text.enhance import enhance_prompt
    from mlx_sora.video import Video

__version__ = "0.1.0"

__all__ = [
    "GenerationRequest",
    "GuidanceCache",
    "GuidanceInterval",
    "Lpl",
    "MemoryBudgetError",
    "MlxSoraError",
    "NumericsError",
    "Pipeline",
    "StepCache",
    "Tdtm",
    "UsageError",
    "Video",
    "WeightsError",
    "__version__",
    "enhance_prompt",
]

#: Public names that load their module on first access.
_LAZY = {
    "GenerationRequest": "mlx_sora.request.generation",
    "GuidanceCache": "mlx_sora.request.techniques",
    "GuidanceInterval": "mlx_sora.request.techniques",
    "Lpl": "mlx_sora.request.techniques",
    "Pipeline": "mlx_sora.pipeline",
    "StepCache": "mlx_sora.request.techniques",
    "Tdtm": "mlx_sora.request.techniques",
    "Video": "mlx_sora.video",
    "enhance_prompt": "mlx_sora.text.enhance",
}

_blas.install()
_switches.set_defaults()


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'mlx_sora' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
