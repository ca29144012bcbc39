"""Reflection against plain sampling at equal evaluations of the network, on the bundled model.

    python -m benchmarks.reflection [--prompts 96] [--seeds 3] [--frames 1 17] [--json FILE]

A reflected step (Z-Sampling, arXiv 2412.10891; W2SD, 2502.00473) goes forward with guidance, back
without it, and forward again: 2.5 times the work of a guided step. So 4 of 24 and 8 of 18 steps
cost as much as 30 plain ones. Paired: the same held-out prompts and noise. Counted are videos that
show all that was asked, and how often only one of the two does. A row that the file already has is
not measured again. The engine has no such option; this is where it is tried.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from unittest import mock

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip

from benchmarks.common import RESULTS, markdown, scored_parser, write_json
from benchmarks.shapes import world
from benchmarks.shapes.score import Generate, pipeline_generator
from benchmarks.shapes.scorer import FIELDS, read_video
from mlx_sora.sampling.base import State, Step, VelocityFn
from mlx_sora.sampling.guidance import Guidance
from mlx_sora.sampling.rflow import RFlow

#: Steps, and how many of them are reflected; all take 60 samples through the network.
SETTINGS = ((30, 0), (24, 4), (18, 8))


@dataclass(frozen=True)
class Row:
    """One setting with one seed. right: of each prompt, True if the video shows all of it."""

    frames: int
    seed: int
    steps: int
    reflected: int
    right: tuple[bool, ...]

    @property
    def work(self) -> tuple[int, int, int, int]:
        return self.frames, self.seed, self.steps, self.reflected


@contextmanager
def reflecting(count: int) -> Iterator[None]:
    """Reflect the first `count` steps of runs with Euler steps inside the block."""
    guided, euler, weak = Guidance.__call__, RFlow.step, list[bool]()

    def predict(self: Guidance, z: mx.array, t: mx.array, step: Step) -> mx.array:
        return guided(replace(self, scale=1.0) if weak else self, z, t, step)

    def step_twice(
        self: RFlow, velocity_fn: VelocityFn, z: mx.array, v: mx.array, step: Step, history: State
    ) -> mx.array:
        if step.index < count:
            there = euler(self, velocity_fn, z, v, step, history)
            weak.append(True)
            z = there - velocity_fn(there, step.t_next) * step.dt
            mx.eval(z)
            weak.clear()
            v = velocity_fn(z, step.t)
        return euler(self, velocity_fn, z, v, step, history)

    with (
        mock.patch.object(Guidance, "__call__", predict),
        mock.patch.object(RFlow, "step", step_twice),
    ):
        yield


def measure(generate: Generate, truths: Sequence[world.Attributes], seed: int) -> Iterator[bool]:
    """For each truth, whether its video shows it."""
    for case, truth in enumerate(truths):
        video = generate(world.caption(truth), seed * len(truths) + case)
        reading = read_video(video)
        fields = [field for field in FIELDS if len(video) > 1 or field != "motion"]
        yield all(getattr(reading, field) == getattr(truth, field) for field in fields)


def show(rows: Sequence[Row]) -> str:
    """Shares of all seeds; beside them videos that only the reflected or only the plain one has."""
    lines = []
    for frames in dict.fromkeys(row.frames for row in rows):
        for steps, reflected in SETTINGS:
            own = [
                r for r in rows if (r.frames, r.steps, r.reflected) == (frames, steps, reflected)
            ]
            pairs = [
                (a, b)
                for row in own
                for plain in rows
                if (plain.frames, plain.seed, plain.reflected) == (frames, row.seed, 0)
                for a, b in zip(row.right, plain.right, strict=True)
            ]
            hits = [hit for row in own for hit in row.right]
            if hits:
                gained, lost = pairs.count((True, False)), pairs.count((False, True))
                share = f"{sum(hits) / len(hits):.1%} of {len(hits)}"
                cells = [share, f"+{gained} -{lost}" if reflected else ""]
                lines.append([str(frames), f"{reflected} of {steps}", *cells])
    return markdown(["frames", "reflected steps", "all right", "against plain"], lines)


def main() -> None:
    parser = scored_parser(__doc__ or "", 96, RESULTS / "reflection.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--frames", type=int, nargs="+", default=[1, world.CHUNK])
    asked = parser.parse_args()
    truths = world.split()[1][: asked.prompts]
    found = json.loads(asked.json.read_text())["rows"] if asked.json.exists() else []
    rows = [Row(**{**row, "right": tuple(row["right"])}) for row in found]
    for frames in asked.frames:
        for seed in range(asked.seeds):
            for steps, reflected in SETTINGS:
                if (frames, seed, steps, reflected) in [row.work for row in rows]:
                    continue
                with reflecting(reflected):
                    generate = pipeline_generator(asked.model, steps=steps, num_frames=frames)
                    right = tuple(measure(generate, truths, seed))
                rows.append(Row(frames, seed, steps, reflected, right))
                write_json(asked.json, {"rows": [asdict(row) for row in rows]})
                print(f"{frames} frames, {reflected} of {steps}: {sum(right)}", flush=True)
    print(show(rows))


if __name__ == "__main__":
    main()
