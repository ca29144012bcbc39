"""How many threads of numpy's OpenBLAS make a video fastest, beside other programs? Linux.

    python -m benchmarks.blas_threads [--runs 3] [--json FILE]

Each video (17 frames, 4 steps of the bundled model) is a process of its own, by turns with one
thread, with all, and with the default, which follows what is free; alone, and with a program that
computes on each processor. Seconds are those of the stages; `busy` is what others used, measured
before each row.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import alternate, arguments, write_json
from mlx_sora.runtime.blas import Processors
from mlx_sora.video.metadata import read_metadata

COMMAND = [sys.executable, "-m", "mlx_sora", "generate", "-p", "a red circle", "--seed", "1"]
COMMAND += ["--model", "shapes", "--num-frames", "17", "--steps", "4", "--no-text-cache"]
COMMAND += ["--no-health-check", "--overwrite", "--quiet", "-o"]


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Programs that compute for as long as the block runs."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def make_video(file: Path, threads: int | None, times: list[float]) -> None:
    """Make a video and append the seconds of its stages."""
    env = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    if threads is not None:
        env["OPENBLAS_NUM_THREADS"] = str(threads)
    subprocess.run([*COMMAND, str(file)], env=env, check=True, stdout=subprocess.DEVNULL)
    times.append(sum(read_metadata(file)["seconds"].values()))


def measure(runs: int) -> dict[str, Any]:
    """Median seconds by number of threads, a row for each number of other programs."""
    cores, rows, processors = len(os.sched_getaffinity(0)), [], Processors()
    with tempfile.TemporaryDirectory() as folder:
        for others in (0, cores):
            with busy_programs(others):
                processors.free()
                time.sleep(2)
                free = processors.free() or 0.0
                seconds: dict[str, list[float]] = {"one": [], "all": [], "default": []}
                works = [
                    partial(make_video, Path(folder) / "a.mp4", threads, times)
                    for threads, times in zip((1, cores, None), seconds.values(), strict=True)
                ]
                alternate(runs, *works)
                medians = {name: round(statistics.median(t), 2) for name, t in seconds.items()}
                row = {"programs": others, "busy": round(cores - free, 2), **medians}
                print(row, flush=True)
                rows.append(row)
    return {"processors": cores, "runs": runs, "rows": rows}


def main() -> None:
    options = arguments(__doc__, runs=3)
    result = measure(options.runs)
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
