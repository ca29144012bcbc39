"""How far `--dry-run`'s seconds are from real ones, at the published width on this machine.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.estimates [--json FILE]

Writes a model of random weights with a few of the published blocks into a temporary folder (4 GB),
measures the machine as `doctor --machine` does, and runs stages of generations. Both sides are in
processor time: others use this machine, too. The speeds are measured before and after each run,
and their mean counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip

from benchmarks.common import RESULTS, arguments, markdown, write_json
from benchmarks.full_model import write_model
from mlx_sora.manage.machine_speed import SpeedTest
from mlx_sora.memory.limits import memory_scope
from mlx_sora.memory.speeds import MachineSpeeds
from mlx_sora.pipeline.pipeline import Pipeline
from mlx_sora.request.generation import GenerationRequest
from mlx_sora.runtime.events import StageFinished, StageStarted

#: Blocks of the model that is measured, of 24 and 28.
DEPTHS = {"text_encoder": 2, "transformer": 2}

PROMPT = "a lighthouse on a cliff at dusk, waves break on the rocks below, seen from a drone"


@dataclass(frozen=True)
class Case:
    """A generation. last: the stage after which it ends."""

    name: str
    last: str
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = (
    Case("240p × 51, guided", "denoise", {"resolution": "240p", "num_frames": 51, "steps": 1}),
    Case("144p × 51, guided", "denoise", {"resolution": "144p", "num_frames": 51, "steps": 2}),
    Case("240p, an image", "denoise", {"resolution": "240p", "num_frames": 1, "steps": 4}),
    Case("144p × 17", "decode", {"resolution": "144p", "num_frames": 17, "steps": 1}),
)


@dataclass(frozen=True)
class Row:
    """A stage, in processor seconds. ratio: of the estimate to the real ones."""

    case: str
    stage: str
    estimated: float
    real: float
    ratio: float


def real_seconds(pipeline: Pipeline, request: GenerationRequest, last: str) -> dict[str, float]:
    """Processor seconds of each stage up to `last`."""
    seconds, start = {}, 0.0
    with closing(pipeline.stream(request)) as events:
        for event in events:
            if isinstance(event, StageStarted):
                start = time.process_time()
            elif isinstance(event, StageFinished):
                seconds[event.stage] = time.process_time() - start
                if event.stage == last:
                    break
    return seconds


def measure(
    pipeline: Pipeline, case: Case, before: MachineSpeeds
) -> tuple[list[Row], MachineSpeeds]:
    """Rows of a case, and the speeds after it."""
    request = GenerationRequest.from_dict({"prompt": PROMPT, "seed": 1, **case.options})
    real = real_seconds(pipeline, request, case.last)
    after = measured_speeds()
    run = pipeline.prepare(request)
    estimates = [run.estimate(speeds).seconds for speeds in (before, after)]
    rows = []
    for stage, seconds in real.items():
        estimated = sum(each[stage] for each in estimates) / 2
        rows.append(Row(case.name, stage, estimated, seconds, estimated / seconds))
    return rows, after


def measured_speeds() -> MachineSpeeds:
    """Speeds in processor time."""
    return SpeedTest(clock=time.process_time).run(lambda _: None)


def show(rows: list[Row]) -> str:
    return markdown(
        ["", "stage", "estimated", "real", "ratio"],
        [
            [row.case, row.stage, f"{row.estimated:.1f} s", f"{row.real:.1f} s", f"{row.ratio:.2f}"]
            for row in rows
        ],
    )


def main() -> None:
    options = arguments(__doc__ or "", 1, RESULTS / "estimates.json")
    with tempfile.TemporaryDirectory() as folder:
        with memory_scope():
            write_model(Path(folder), mx.float32, DEPTHS)
        pipeline, rows = Pipeline.from_pretrained(folder), list[Row]()
        speeds = measured_speeds()
        for case in CASES:
            found, speeds = measure(pipeline, case, speeds)
            rows += found
            print(show(found), flush=True)
    write_json(
        options.json,
        {"depths": DEPTHS, "speeds": speeds.to_dict(), "rows": [asdict(row) for row in rows]},
    )


if __name__ == "__main__":
    main()
