"""Seconds against memory at the size of the published model.

    python -m benchmarks.full_model FOLDER && python -m benchmarks.memory FOLDER [--json FILE]

Makes an image of 144p in two guided steps, text to file, within each budget, at 16 and 8 bits,
each time in a new process. An image is the worst case of streaming: its blocks compute only about
as long as they load, those of a video much longer. Weights are random: within a budget the pictures
stay the same, and fewer bits are judged on the bundled model (`benchmarks/quantized.py`). Seconds
are the processor's, all threads together, which other work on the machine disturbs less than a
clock. FOLDER-8bit is converted from FOLDER if it is missing. Rows that the file has are not
measured again. `python -m benchmarks.plots memory` draws them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, markdown, write_json
from mlx_sora.cli.bench.measure import measure
from mlx_sora.memory.profiles import format_bytes, parse_bytes

#: Bits of the weights → budgets, from about the smallest possible one.
BUDGETS = {
    16: ("970MB", "1.5GB", "2.5GB", "4GB", "6GB"),
    8: ("970MB", "1.5GB"),
}
SETTINGS = {"num-frames": 1, "resolution": "144p", "steps": 2, "seed": 0}

#: Text states of an earlier run would save the reading of T5.
FLAGS = ("--no-text-cache", "--prompt=a cat")


def model_of(folder: Path, bits: int) -> Path:
    """The model folder with these bits; converted if it is missing."""
    if bits == 16:
        return folder
    target = folder.with_name(f"{folder.name}-{bits}bit")
    if not target.exists():
        command = [sys.executable, "-m", "mlx_sora", "convert", str(folder), str(target)]
        subprocess.run([*command, "--quantize", str(bits)], check=True)
    return target


def measured(model: Path, bits: int, budget: str) -> dict[str, Any]:
    """One row: seconds, and peak bytes of the process."""
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    found = measure([*flags, *FLAGS, f"--model={model}", f"--memory-budget={budget}"])
    return {
        "bits": bits,
        "budget": parse_bytes(budget),
        "peak": found.peak,
        "processor": found.processor,
        "wall": found.wall,
        "stages": dict(found.stages),
        "resident": found.stream["denoise"]["resident"],
        "bytes_read": sum(stage["bytes_read"] for stage in found.stream.values()),
    }


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    return markdown(
        ["bits", "budget", "peak", "processor s", "resident blocks", "read"],
        [
            [
                str(row["bits"]),
                format_bytes(row["budget"]),
                format_bytes(row["peak"]),
                f"{row['processor']:.0f}",
                f"{row['resident']} of 28",
                format_bytes(row["bytes_read"]),
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.json.exists():
        rows = json.loads(options.json.read_text(encoding="utf-8"))["rows"]
    known = {(row["bits"], row["budget"]) for row in rows}
    for bits, budgets in BUDGETS.items():
        for budget in budgets:
            if (bits, parse_bytes(budget)) not in known:
                rows.append(measured(model_of(options.folder, bits), bits, budget))
                rows.sort(key=lambda row: (-row["bits"], row["budget"]))
                write_json(options.json, {"settings": SETTINGS, "rows": rows})
    print(show(rows))


if __name__ == "__main__":
    main()
