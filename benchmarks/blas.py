"""Does MLX reach numpy's speed on this CPU? float32 [5760, 1152] x [1152, 4608], runs alternating.

    python -m benchmarks.blas [--runs 15] [--json FILE]

Exits with 1 below 0.8 of numpy's median.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)
from benchmarks.common import alternate, arguments, write_json

ROWS, INNER, COLUMNS = 5760, 1152, 4608
GOAL = 0.8


def measure(runs: int) -> dict[str, Any]:
    """GF/s of both, medians over `runs` alternating products; `ratio` = MLX / numpy, run by run."""
    import mlx.core as mx
    import numpy as np

    mx.set_cache_limit(1 << 30)
    rng = np.random.default_rng(0)
    a = rng.standard_normal((ROWS, INNER), dtype=np.float32)
    b = rng.standard_normal((INNER, COLUMNS), dtype=np.float32)
    x, y = mx.array(a), mx.array(b)
    mx.eval(x, y, x @ y)
    error = float(np.abs(np.array(x @ y) - a @ b).max())
    times = alternate(runs, lambda: mx.eval(x @ y), lambda: a @ b)
    flops = 2e-9 * ROWS * INNER * COLUMNS
    return {
        "product": [ROWS, INNER, COLUMNS],
        "runs": runs,
        "mlx_gflops": flops / statistics.median(m for m, _ in times),
        "numpy_gflops": flops / statistics.median(n for _, n in times),
        "ratio": statistics.median(n / m for m, n in times),
        "max_difference": error,
    }


def main() -> int:
    options = arguments(__doc__, runs=15)
    result = measure(options.runs)
    print(
        "MLX {mlx_gflops:.0f} GF/s, numpy {numpy_gflops:.0f} GF/s, ratio {ratio:.2f}".format(
            **result
        )
    )
    if options.json:
        write_json(options.json, result)
    return 0 if result["ratio"] >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
