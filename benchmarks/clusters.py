"""Estimate the seconds of a step of Open-Sora 1.2 on 2, 4 and 8 Macs, and the share of exchange.

    python -m benchmarks.clusters [--chip m4-max] [--json FILE]

Estimated, not measured. The formula and its sources are in `mlx_sora/distributed/cost_model.py`:
the fastest way to split an evaluation, with guidance, weights in bfloat16, no accelerations.
`mlx_sora bench link` measures a cluster, and `generate --dry-run --ranks N --link … --chip …`
takes its figures.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import RESULTS, markdown, write_json
from mlx_sora.distributed.cost_model import LINKS, Chip, Cluster, estimate_step, parse_chip
from mlx_sora.geometry import Size, plan_geometry
from mlx_sora.memory.estimate import published_sizes
from mlx_sora.memory.plan import ModelSizes, Workload

SIZES = {"240p": Size(426, 240), "480p": Size(854, 480), "720p": Size(1280, 720)}
FRAMES, RANKS, TOKENS = (51, 102, 204), (2, 4, 8), 60


@dataclass(frozen=True)
class Row:
    """Estimate of a step. share: fraction of exchange. sent: bytes, by each rank."""

    resolution: str
    frames: int
    link: str
    ranks: int
    parallel: str
    seconds: float
    share: float
    sent: int


def rows(model: ModelSizes, chip: Chip) -> list[Row]:
    """Return rows for one Mac, then for every link and number of Macs, by size and length."""
    table = []
    for name, size in SIZES.items():
        for frames in FRAMES:
            workload = Workload(plan_geometry(size, frames), TOKENS, 1)
            for link in LINKS:
                for ranks in (1, *RANKS) if link == LINKS[0] else RANKS:
                    best = estimate_step(model, workload, Cluster(ranks, chip, link))[0]
                    row = (name, frames, link.name, ranks, best.parallel_plan.mode)
                    table.append(Row(*row, best.seconds, best.exchange_share, best.sent_bytes))
    return table


def show(table: list[Row]) -> str:
    """Return a table: seconds of a step, speed against one Mac, share of exchange."""
    heads = [f"{link.name} × {ranks}" for link in LINKS for ranks in RANKS]
    lines = []
    for name in SIZES:
        for frames in FRAMES:
            here = [row for row in table if (row.resolution, row.frames) == (name, frames)]
            single, *others = here
            cells = [
                f"{_seconds(row)}, {single.seconds / row.seconds:.1f}×, {row.share:.0%}"
                for row in others
            ]
            lines.append([f"{name} × {frames}", _seconds(single), *cells])
    return markdown(["", "one Mac", *heads], lines)


def _seconds(row: Row) -> str:
    return f"{row.seconds:.{0 if row.seconds >= 100 else 1}f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", default="m4-max")
    parser.add_argument("--json", type=Path, default=RESULTS / "clusters.json")
    options = parser.parse_args()
    chip = parse_chip(options.chip)
    table = rows(published_sizes(2), chip)
    print(show(table))
    write_json(options.json, {"chip": asdict(chip), "rows": [asdict(row) for row in table]})


if __name__ == "__main__":
    main()
