"""Quality of each sampler against evaluations of the network, on the bundled model.

    python -m benchmarks.samplers [--prompts 16] [--json FILE]

Every sampler makes the same held-out prompts, one seed each, at every number of evaluations. PSNR
compares with the same seed followed by 120 midpoint steps, which is as good as the flow itself;
adherence is the share of videos that show all that was asked. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.common import RESULTS, markdown, scored_parser, write_json
from benchmarks.ondevice import psnr
from benchmarks.shapes import world
from benchmarks.shapes.score import Generate, pipeline_generator
from benchmarks.shapes.scorer import read_video, score
from mlx_sora.sampling import SAMPLERS

REFERENCE = {"sampler": "midpoint", "steps": 120}
EVALUATIONS = (6, 10, 16, 24, 36, 60)


@dataclass(frozen=True)
class Row:
    """One sampler at one number of evaluations.

    psnr: dB of all frames together; psnr_median: of single videos. adherence: share of videos right
    in all, shape: in shape. latents are decoded alike, so that nothing but the sampler differs.
    """

    sampler: str
    steps: int
    evaluations: int
    psnr: float | None
    psnr_median: float | None
    adherence: float
    shape: float


def rows(truths: Sequence[world.Attributes], model: str) -> Iterator[Row]:
    """Every sampler at every number of evaluations, as they are measured."""
    reference = list(made(pipeline_generator(model, **REFERENCE), truths))
    scores = score(map(read_video, reference), truths)
    print(f"reference: all right {scores['all']:.0%}", flush=True)
    for evaluations in EVALUATIONS:
        for name, sampler in SAMPLERS.items():
            steps = evaluations // sampler.evaluations
            videos = list(made(pipeline_generator(model, sampler=name, steps=steps), truths))
            errors = [error(a, b) for a, b in zip(videos, reference, strict=True)]
            scores = score(map(read_video, videos), truths)
            yield Row(
                name,
                steps,
                evaluations,
                psnr(statistics.mean(errors)),
                psnr(statistics.median(errors)),
                scores["all"],
                scores["shape"],
            )


def made(generate: Generate, truths: Sequence[world.Attributes]) -> Iterator[np.ndarray]:
    return (generate(world.caption(truth), seed) for seed, truth in enumerate(truths))


def error(video: np.ndarray, reference: np.ndarray) -> float:
    """Mean squared error in 8-bit levels."""
    return float(np.mean((video.astype(np.float64) - reference) ** 2))


def show(found: Sequence[Row]) -> str:
    headings = ["evaluations"]
    headings += [f"{name}: {what}" for name in SAMPLERS for what in ("PSNR", "all right")]
    cells = {(row.sampler, row.evaluations): row for row in found}
    lines = []
    for evaluations in EVALUATIONS:
        line = [str(evaluations)]
        for name in SAMPLERS:
            row = cells[name, evaluations]
            line += ["–" if row.psnr is None else f"{row.psnr:.1f}", f"{row.adherence:.0%}"]
        lines.append(line)
    return markdown(headings, lines)


def main() -> None:
    parser = scored_parser(__doc__ or "", 16, RESULTS / "samplers.json")
    asked = parser.parse_args()
    truths = world.split()[1][: asked.prompts]
    found = []
    for row in rows(truths, asked.model):
        found.append(row)
        print(row, flush=True)
    print(show(found))
    write_json(asked.json, {"prompts": len(truths), "rows": [asdict(row) for row in found]})


if __name__ == "__main__":
    main()
