"""Seconds from the command to its first step and to its end, and peak memory, of a small video.

    python -m benchmarks.startup [--against CHECKOUT] [--runs 10] [--json FILE]

Every run is a process of its own: `python -m mlx_sora generate` with the bundled model, 17 frames,
4 steps. `--against` names another checkout (with its compiled BLAS), whose runs alternate with
those of this one, so that their ratios hold on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import RESULTS, markdown, write_json

HERE = Path(__file__).parents[1]
WORDS = ("generate", "--model", "shapes", "-p", "a red circle moves right", "--seed", "1")
OPTIONS = ("--steps", "4", "--json-events", "--overwrite")


@dataclass(frozen=True)
class StartupRun:
    """One process: seconds to the first step and to the end, peak resident bytes."""

    first_step: float
    total: float
    peak_rss: int


def measure(checkout: Path, output: Path) -> StartupRun:
    """Run the command line of a checkout once."""
    command = [sys.executable, "-m", "mlx_sora", *WORDS, *OPTIONS, "-o", str(output)]
    started = time.perf_counter()
    first_step = 0.0
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not first_step and json.loads(line)["event"] == "step_finished":
                first_step = time.perf_counter() - started
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {checkout}")
    scale = 1 if sys.platform == "darwin" else 1024
    return StartupRun(first_step, time.perf_counter() - started, usage.ru_maxrss * scale)


def median(runs: list[StartupRun]) -> StartupRun:
    """Return the median of each figure."""
    columns = zip(*(asdict(run).values() for run in runs), strict=True)
    first_step, total, peak_rss = (statistics.median(column) for column in columns)
    return StartupRun(round(first_step, 3), round(total, 3), int(peak_rss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout to alternate with")
    parser.add_argument("--runs", type=int, default=10, help="default 10")
    parser.add_argument("--json", type=Path, default=RESULTS / "startup.json")
    options = parser.parse_args()
    checkouts = {"this": HERE} | ({"before": options.against} if options.against else {})
    runs: dict[str, list[StartupRun]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.runs):
            for name, checkout in checkouts.items():
                runs[name].append(measure(checkout.resolve(), Path(folder) / "a.webp"))
    medians = {name: median(each) for name, each in runs.items()}
    rows = [
        (name, f"{m.first_step:.2f} s", f"{m.total:.2f} s", f"{m.peak_rss / 1e6:.0f} MB")
        for name, m in medians.items()
    ]
    print(markdown(("checkout", "first step", "total", "peak memory"), rows))
    result: dict[str, object] = {"runs": options.runs}
    result |= {name: asdict(each) for name, each in medians.items()}
    if options.against:
        result["ratio"] = {
            field: round(
                statistics.median(
                    getattr(a, field) / getattr(b, field)
                    for a, b in zip(runs["this"], runs["before"], strict=True)
                ),
                3,
            )
            for field in ("first_step", "total", "peak_rss")
        }
        print(f"ratio to before: {result['ratio']}")
    write_json(options.json, result)


if __name__ == "__main__":
    main()
