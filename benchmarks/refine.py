"""Cost of two passes at full width: seconds and peaks of each stage beside the plan, and 720p.

    python -m benchmarks.refine [--depth 4] [--json FILE]

Random weights of the published shapes, written to a temporary folder: T5 with one block, STDiT with
`--depth` block pairs, the whole VAE. An image of 128 x 128 is refined to 256 x 256 in a process of
its own, so that the bench ends in minutes on a CPU; what it shows is noise. The plan of the whole
model at 240p to 720p, 51 frames and 30 steps, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip

from benchmarks.common import RESULTS, markdown, write_json
from benchmarks.full_model import write_model
from mlx_sora.memory.limits import memory_scope
from mlx_sora.memory.profiles import format_bytes

SMALL = ("--num-frames=1", "--width=128", "--height=128", "--refine=256x256", "--steps=2")
LARGE = ("--resolution=240p", "--refine=720p", "--num-frames=51", "--steps=30")


def events(words: list[str]) -> list[dict[str, Any]]:
    """Run `generate` in a process of its own; return the lines of JSON that it prints."""
    command = [sys.executable, "-m", "mlx_sora", "generate", "--prompt=a cat", "--json-events"]
    command += ["--memory-budget=off", "--no-text-cache", "--no-health-check", "--allow-sleep"]
    found = subprocess.run([*command, *words], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


def planned(words: list[str]) -> list[dict[str, Any]]:
    """Stage, peak and operations of each stage of a plan."""
    plan = next(each for each in events([*words, "--dry-run"]) if "stages" in each)
    return [{key: stage[key] for key in ("stage", "peak", "flops")} for stage in plan["stages"]]


def measured(folder: Path) -> list[dict[str, Any]]:
    """The stages of the small run, with seconds and peaks of the process."""
    words = [f"--model={folder}", *SMALL, "--seed=0"]
    plan = planned(words)
    made = events([*words, f"--output={folder / 'a.png'}"])
    ends = [event for event in made if event["event"] == "stage_finished"]
    return [
        stage | {"seconds": round(end["seconds"], 2), "measured_peak": end["peak_rss"]}
        for stage, end in zip(plan, ends, strict=True)
    ]


def show(rows: list[dict[str, Any]]) -> str:
    """The table."""
    return markdown(
        ["stage", "TFLOP", "seconds", "peak", "planned peak"],
        [
            [
                row["stage"],
                f"{row['flops'] / 1e12:.3g}",
                str(row.get("seconds", "")),
                format_bytes(row["measured_peak"]) if "measured_peak" in row else "",
                format_bytes(row["peak"]),
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=4, help="block pairs of STDiT; default 4")
    parser.add_argument("--json", type=Path, default=RESULTS / "refine.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, memory_scope():
        model = Path(folder, "model")
        write_model(model, mx.float32, {"text_encoder": 1, "transformer": options.depth})
        small = measured(model)
    large = planned(["--model=opensora-1.2", *LARGE])
    settings = {"small": SMALL, "depth": options.depth, "large": LARGE}
    write_json(options.json, {"settings": settings, "small": small, "large": large})
    print(show(small), show(large), sep="\n\n")


if __name__ == "__main__":
    main()
