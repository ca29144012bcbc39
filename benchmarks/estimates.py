"""How far `--dry-run`'s seconds are from real ones, at the published width on this machine.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.estimates [--only NAME] [--json FILE]

Writes a model of random weights with a few of the published blocks into a temporary folder (4 GB),
measures the machine as `doctor --machine` does, and runs stages of generations, whose files are
dropped from the page cache before. Both sides are in processor time: others use this machine, too.
The speeds are measured before and after each run, and their mean counts. Rows of other cases that
are in the file stay.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip

from benchmarks.common import RESULTS, markdown, write_json
from benchmarks.full_model import write_model
from mlx_sora.manage.disk_speed import forget_cached
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
    """A generation. stage: the one that counts, after which it ends."""

    name: str
    stage: str
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = (
    Case("a prompt", "encode"),
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


def real_seconds(pipeline: Pipeline, request: GenerationRequest, stage: str) -> float:
    """Processor seconds of a stage."""
    for file in pipeline.model.path.rglob("*.safetensors"):
        forget_cached(file)
    start = 0.0
    with closing(pipeline.stream(request)) as events:
        for event in events:
            if isinstance(event, StageStarted):
                start = time.process_time()
            elif isinstance(event, StageFinished) and event.stage == stage:
                return time.process_time() - start
    raise AssertionError(f"there is no stage {stage}")


def measure(pipeline: Pipeline, case: Case, before: MachineSpeeds) -> tuple[Row, MachineSpeeds]:
    """The row of a case, and the speeds after it."""
    request = GenerationRequest.from_dict({"prompt": PROMPT, "seed": 1, **case.options})
    real = real_seconds(pipeline, request, case.stage)
    after = measured_speeds()
    run = pipeline.prepare(request)
    estimated = sum(run.estimate(speeds).seconds[case.stage] for speeds in (before, after)) / 2
    return Row(case.name, case.stage, estimated, real, estimated / real), after


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


def keep(path: Path, row: Row, speeds: MachineSpeeds) -> None:
    """Put a row into the file, in place of the one of the same case."""
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    others = {each["case"]: each for each in (*old, asdict(row))}
    rows = [others[case.name] for case in CASES if case.name in others]
    write_json(path, {"depths": DEPTHS, "speeds": speeds.to_dict(), "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name begins so")
    parser.add_argument("--json", type=Path, default=RESULTS / "estimates.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with memory_scope():
            write_model(Path(folder), mx.float32, DEPTHS)
        pipeline, speeds = Pipeline.from_pretrained(folder), measured_speeds()
        os.sync()  # only then can pages be dropped
        for case in CASES:
            if case.name.startswith(options.only):
                row, speeds = measure(pipeline, case, speeds)
                print(show([row]), flush=True)
                keep(options.json, row, speeds)


if __name__ == "__main__":
    main()
