"""What On-device Sora's techniques (LPL, TDTM, CI-DL) save and cost in quality, like for like.

    python -m benchmarks.ondevice [--prompts 24] [--frames 17] [--json FILE]

Runs the bundled model on held-out prompts, one seed each, every row on the same ones and in turn.
Speeds are medians of ratios to exact, prompt by prompt: of the steps, and of the whole denoising
stage, which also reads the weights. PSNR and SSIM compare with the exact video of the same seed;
adherence is the share of videos that show all that was asked. Needs `pip install -e ".[bench]"`.
`benchmarks/ondevice_full.py` has the same rows at the size of the published model.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, markdown, scored_parser, write_json
from benchmarks.shapes import world
from benchmarks.shapes.scorer import Reading, read_video, score
from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.pipeline.generate import generate, prepare
from mlx_sora.runtime.events import Event, Finished, StageFinished, StepFinished

EXACT = "exact"

#: Row of streaming without loading ahead, which no option of a request asks for.
ON_DEMAND = "CI-DL, on demand"


def stream_on_demand(pipe: Pipeline, request: GenerationRequest) -> Iterator[Event]:
    """Yield the events of a run that reads each streamed block when it is needed, never ahead."""
    run = prepare(pipe.engine, request)
    stages = tuple(replace(stage, prefetch=False) for stage in run.plan.stages)
    yield Finished((yield from generate(replace(run, plan=replace(run.plan, stages=stages)))))


def rows_for(steps: int, budget: int) -> dict[str, dict[str, Any]]:
    """Row → options of the request; shares of the run as in the paper (15, 23, 10, 20 of 30).

    budget: bytes that leave room for some of the blocks.
    """
    half, third, late = steps // 2, steps // 3, round(steps * 23 / 30)
    dynamic = {"memory_budget": str(budget)}
    return {
        EXACT: {},
        f"LPL, fixed {half}": {"lpl": f"fixed:{half}"},
        f"LPL, fixed {half}, order 1": {"lpl": f"fixed:{half},order=1"},
        f"LPL, fixed {late}": {"lpl": f"fixed:{late}"},
        "LPL, t 660": {"lpl": "t:660"},
        "LPL, adaptive": {"lpl": "adaptive"},
        f"TDTM, first {third}": {"tdtm": str(third)},
        f"TDTM, first {half}": {"tdtm": str(half)},
        f"TDTM, first {2 * third}": {"tdtm": str(2 * third)},
        "TDTM, all": {"tdtm": "all"},
        f"LPL, fixed {half} + TDTM, first {half}": {"lpl": f"fixed:{half}", "tdtm": str(half)},
        f"LPL, adaptive + TDTM, first {half}": {"lpl": "adaptive", "tdtm": str(half)},
        ON_DEMAND: {"ci_dl": True},
        "CI-DL, ahead": {"ci_dl": True},
        "CI-DL, dynamic": dynamic,
        "all three": {"lpl": f"fixed:{half}", "tdtm": str(half), **dynamic},
        "all three, TDTM all": {"lpl": f"fixed:{half}", "tdtm": "all", **dynamic},
    }


@dataclass
class Made:
    """One video and what it cost: seconds of its steps and of the stage, MLX's peak in bytes."""

    frames: np.ndarray
    evaluations: float
    seconds: float
    stage_seconds: float
    memory: int


@dataclass
class Tally:
    """What is gathered of one row, a value per prompt."""

    evaluations: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stage_seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    stage_ratios: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    motion: list[float] = field(default_factory=list)
    travel: list[float] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A row of the table. psnr: dB over all frames together, None where they are the same.

    seconds: medians, of the steps and of the denoising stage. speed: median ratios to exact.
    memory: peak bytes. motion: mean change from frame to frame, travel: from the first to the last
    quarter of the clip, both in 8-bit levels. adherence: share of videos by attribute, and of those
    right in all.
    """

    row: str
    options: Mapping[str, Any]
    evaluations: float
    seconds: float
    stage_seconds: float
    speed: float
    stage_speed: float
    memory: int
    psnr: float | None
    ssim: float
    motion: float
    travel: float
    adherence: Mapping[str, float]


def tight_budget(options: argparse.Namespace) -> int:
    """Bytes between the smallest possible and what all resident blocks need, if that is more."""
    pipe = Pipeline.from_pretrained(options.model)
    request = GenerationRequest(prompt="a", num_frames=options.frames, steps=options.steps)
    plan = pipe.plan(request)
    return max(plan.smallest, (plan.smallest + plan.stage("denoise").peak) // 2)


def make(pipe: Pipeline, request: GenerationRequest, *, prefetch: bool = True) -> Made:
    """Make one video; measure its denoising stage."""
    steps, cost = list[float](), None
    for event in pipe.stream(request) if prefetch else stream_on_demand(pipe, request):
        if isinstance(event, StepFinished):
            steps.append(event.seconds)
        elif isinstance(event, StageFinished) and event.stage == "denoise":
            cost = event
        elif isinstance(event, Finished):
            assert cost is not None
            assert event.video.frames is not None
            # One evaluation per step: rflow, and a leap takes one too.
            frames = event.video.frames
            return Made(frames, len(steps), sum(steps), cost.seconds, cost.peak_memory)
    raise AssertionError("a run ends with Finished")


def gather(options: argparse.Namespace) -> dict[str, Tally]:
    """Every row on every prompt; the order of the rows turns, so that none is always first."""
    pipe = Pipeline.from_pretrained(options.model)
    rows = rows_for(options.steps, options.budget)
    tallies = {name: Tally() for name in rows}
    names = list(rows)
    for seed, truth in enumerate(world.split()[1][: options.prompts]):
        common = {"prompt": world.caption(truth), "seed": seed, "steps": options.steps}
        common |= {"num_frames": options.frames, "sampler": "rflow"}
        made: dict[str, Made] = {}
        if seed == 0:
            make(pipe, GenerationRequest.from_dict(common))
        for name in names[seed % len(names) :] + names[: seed % len(names)]:
            request = GenerationRequest.from_dict(common | rows[name])
            made[name] = make(pipe, request, prefetch=name != ON_DEMAND)
        for name, tally in tallies.items():
            add(tally, made[name], made[EXACT])
        print(f"{seed + 1} of {options.prompts} prompts", flush=True)
    return tallies


def add(tally: Tally, made: Made, exact: Made) -> None:
    """Measure one video of a row against the exact one."""
    from skimage.metrics import structural_similarity

    video, reference = made.frames.astype(np.float64), exact.frames.astype(np.float64)
    quarter = max(1, len(video) // 4)
    tally.evaluations.append(made.evaluations)
    tally.seconds.append(made.seconds)
    tally.stage_seconds.append(made.stage_seconds)
    tally.ratios.append(exact.seconds / made.seconds)
    tally.stage_ratios.append(exact.stage_seconds / made.stage_seconds)
    tally.memory.append(made.memory)
    tally.errors.append(float(np.mean((video - reference) ** 2)))
    pairs = zip(exact.frames, made.frames, strict=True)
    tally.ssim.append(
        float(np.mean([structural_similarity(a, b, channel_axis=-1) for a, b in pairs]))
    )
    tally.motion.append(float(np.abs(np.diff(video, axis=0)).mean()))
    ends = video[-quarter:].mean(axis=0) - video[:quarter].mean(axis=0)
    tally.travel.append(float(np.abs(ends).mean()))
    tally.readings.append(read_video(made.frames))


def table(
    tallies: Mapping[str, Tally],
    options: argparse.Namespace,
    modes: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """What was gathered of each row, put together. modes: row → options of the request."""
    truths = world.split()[1][: options.prompts]
    return [
        Row(
            row=name,
            options=modes[name],
            evaluations=statistics.mean(tally.evaluations),
            seconds=statistics.median(tally.seconds),
            stage_seconds=statistics.median(tally.stage_seconds),
            speed=statistics.median(tally.ratios),
            stage_speed=statistics.median(tally.stage_ratios),
            memory=max(tally.memory),
            psnr=psnr(statistics.mean(tally.errors)),
            ssim=statistics.mean(tally.ssim),
            motion=statistics.mean(tally.motion),
            travel=statistics.mean(tally.travel),
            adherence=score(tally.readings, truths),
        )
        for name, tally in tallies.items()
    ]


def psnr(error: float) -> float | None:
    """Decibels of a mean squared error in 8-bit levels; None for no error at all."""
    return 10 * math.log10(255**2 / error) if error > 0 else None


def show(rows: list[Row]) -> str:
    headings = ["", "evaluations", "s", "speed", "stage s", "speed", "peak MB", "PSNR", "SSIM"]
    headings += ["motion", "travel", "all right", "motion right"]
    exact = next(row for row in rows if row.row == EXACT)
    return markdown(
        headings,
        [
            [
                row.row,
                f"{row.evaluations:.1f}",
                f"{row.seconds:.2f}",
                f"{row.speed:.2f}×",
                f"{row.stage_seconds:.2f}",
                f"{row.stage_speed:.2f}×",
                f"{row.memory / 1e6:.0f}",
                "–" if row.psnr is None else f"{row.psnr:.1f}",
                f"{row.ssim:.3f}",
                f"{row.motion / exact.motion:.0%}",
                f"{row.travel / exact.travel:.0%}",
                f"{row.adherence['all']:.0%}",
                f"{row.adherence['motion']:.0%}",
            ]
            for row in rows
        ],
    )


def arguments() -> argparse.Namespace:
    parser = scored_parser(__doc__ or "", 24)
    parser.add_argument("--frames", type=int, default=world.CHUNK)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--budget", type=int, help="bytes, of the dynamic rows; default: tight")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.budget is None:
        options.budget = tight_budget(options)
    rows = table(gather(options), options, rows_for(options.steps, options.budget))
    print(show(rows))
    names = ("model", "prompts", "frames", "steps", "budget")
    setting = {name: getattr(options, name) for name in names}
    target = options.json or RESULTS / "ondevice.json"
    write_json(target, {**setting, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
