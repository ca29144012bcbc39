"""In which step LPL should leap, and along which velocity: rules against a fixed step.

    python -m benchmarks.leaps [--prompts 96] [--rows FILE] [--json FILE]

Follows the flow of held-out prompts in 30 steps, as an image, 17 and 34 frames, and leaps from
every step of each: how far are the latents from those of all steps, in dB of their mean square? A
rule sees what a run has seen until then and leaps once its signal passes a threshold, which is
chosen on other prompts so that it leaps after 10, 15 or 20 steps in the mean. It is compared, video
by video, with the leap after a fixed step at the rule's own mean (between two steps: their mix).
`oracle` knows the error. `order 1` leaps where `fixed` does. PSNR is that of
decoded videos of 24 prompts, after 15 steps. Each video is a line of --rows; those that are there
are not made again. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip

from benchmarks.common import RESULTS, markdown, scored_parser, write_json
from benchmarks.ondevice import psnr
from benchmarks.shapes import world
from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.loading.networks import load_vae
from mlx_sora.models.vae import VideoVAE
from mlx_sora.runtime.device import to_numpy
from mlx_sora.runtime.events import StageFinished, StepFinished
from mlx_sora.video.frames import to_uint8

FRAMES, STEPS, PROMPTS = (1, 17, 34), 30, 96

#: First step with two velocities: the latents before the first step are not among the events.
FIRST = 2

#: Mean steps before the leap at which rules are compared; the one whose videos are decoded, for so
#: many prompts.
TARGETS, DECODED = (10, 15, 20), 15
DECODED_PROMPTS = 24
FOLDS = 8

Table = dict[str, np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """A rule against `fixed` at the rule's mean number of steps, over videos of some lengths.

    steps: before the leap, mean. gain: dB, mean over videos; interval: half of its 95 % interval.
    pooled_gain: of the mean error of all videos. better: share of videos that gain.
    """

    rule: str
    frames: str
    steps: float
    gain: float
    interval: float
    pooled_gain: float
    better: float


def root_mean_square(a: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a, dtype=np.float64))))


def observe(latents: Sequence[np.ndarray], times: Sequence[float]) -> Iterator[dict[str, Any]]:
    """What each step from FIRST to the last but one sees, and its leaps of order 0 and 1.

    latents: after each step. curvature: |dv/dt| · t² / 2, by which a parabola misses. errors: root
    mean square.
    """
    t = np.array([*times, 0.0]) / 1000
    v = {k: (latents[k] - latents[k - 1]) / (t[k] - t[k + 1]) for k in range(1, len(latents))}
    for k in range(FIRST, len(latents) - 1):
        end, bend = latents[k - 1] + v[k] * t[k], (v[k] - v[k - 1]) / (t[k - 1] - t[k])
        ends = [end, end + bend * t[k] ** 2 / 2 * (1 - t[k])]
        yield {
            "t": t[k],
            "cosine": np.vdot(v[k], v[k - 1]) / np.linalg.norm(v[k]) / np.linalg.norm(v[k - 1]),
            "speed": root_mean_square(v[k]),
            "curvature": root_mean_square(bend) * t[k] ** 2 / 2,
            "errors": [root_mean_square(each - latents[-1]) for each in ends],
            "ends": ends,
        }


def follow(pipe: Pipeline, vae: VideoVAE, seed: int, frames: int) -> dict[str, Any]:
    """One line: what the steps of a video saw, and the PSNR of both leaps after DECODED steps."""
    prompt = world.caption(world.split()[1][seed])
    request = GenerationRequest(
        prompt=prompt, seed=seed, steps=STEPS, num_frames=frames, sampler="rflow"
    )
    latents, times = [], []
    for event in pipe.stream(request):
        if isinstance(event, StepFinished):
            latents.append(to_numpy(event.latents))
            times.append(event.t)
        elif isinstance(event, StageFinished) and event.stage == "denoise":
            break
    return describe(latents, times, vae if seed < DECODED_PROMPTS else None, seed, frames)


def describe(
    latents: Sequence[np.ndarray],
    times: Sequence[float],
    vae: VideoVAE | None,
    seed: int,
    frames: int,
) -> dict[str, Any]:
    """The line of a video from the latents after its steps; without a VAE, without PSNR."""
    steps = list(observe(latents, times))
    line: dict[str, Any] = {"frames": frames, "seed": seed}
    if vae is not None:
        ends = [latents[-1], *steps[DECODED - FIRST]["ends"]]
        exact, *leaps = (to_uint8(vae.decode(mx.array(z), frames)[0]).astype(int) for z in ends)
        line["psnr"] = [psnr(float(np.mean((each - exact) ** 2))) for each in leaps]
    for name in ("t", "cosine", "speed", "curvature", "errors"):
        line[name] = np.array([step[name] for step in steps]).astype(np.float32).tolist()
    return line


def gather(file: Path, prompts: int, model: str) -> list[dict[str, Any]]:
    """All lines; those that the file has are not made again."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    done = {(line["frames"], line["seed"]) for line in lines}
    pipe = Pipeline.from_pretrained(model)
    vae = load_vae(pipe.model, ("decoder",))
    for seed in range(prompts):
        for frames in FRAMES:
            if (frames, seed) not in done:
                lines.append(follow(pipe, vae, seed, frames))
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(lines[-1]) + "\n")
        print(f"{seed + 1} of {prompts} prompts", flush=True)
    return [line for line in lines if line["seed"] < prompts]


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Arrays [video, step from FIRST] of each quantity; decibels of both errors."""
    names = ("t", "cosine", "speed", "curvature", "errors")
    found = {name: np.array([line[name] for line in lines]) for name in names}
    decibels = -20 * np.log10(found.pop("errors"))
    return found | {"order 0": decibels[..., 0], "order 1": decibels[..., 1]}


#: Rule → its signal of a video and step, from a table and a table to fit; leaps when it is small.
Signal = Callable[[Table, Table], np.ndarray]


def fitted(data: Table, others: Table) -> np.ndarray:
    """The error as a linear model of all that a step sees foretells it, fitted on others."""

    def features(x: Table) -> np.ndarray:
        parts = [np.log(x["t"]), np.log(x["curvature"]), np.log(x["speed"]), x["cosine"]]
        parts += [parts[0] ** 2, parts[0] * parts[1]]
        return np.stack([np.ones_like(parts[0]), *parts], axis=-1)

    weights = np.linalg.lstsq(
        features(others).reshape(-1, 7), -others["order 0"].ravel(), rcond=None
    )[0]
    return features(data) @ weights


RULES: dict[str, Signal] = {
    "t": lambda data, others: data["t"],
    "cosine": lambda data, others: -data["cosine"],
    "curvature": lambda data, others: data["curvature"],
    "fitted": fitted,
    "oracle": lambda data, others: -data["order 0"],
}


def first_below(signal: np.ndarray, threshold: float) -> np.ndarray:
    """Index of the first step of each video whose signal is below; the last if none is."""
    below = signal <= threshold
    below[:, -1] = True
    return below.argmax(axis=1)


def threshold_for(signal: np.ndarray, target: int) -> float:
    """The threshold at which the mean of the steps is nearest to target."""
    candidates = np.quantile(signal, np.linspace(0, 1, 401))
    means = [first_below(signal, each).mean() + FIRST for each in candidates]
    return float(candidates[np.argmin(np.abs(np.array(means) - target))])


def chosen_steps(rule: Signal, data: Table, seeds: np.ndarray, target: int) -> np.ndarray:
    """Index of the step in which a rule leaps, its threshold from the other prompts."""
    steps = np.zeros(len(seeds), int)
    for fold in range(FOLDS):
        own = seeds % FOLDS == fold
        if not own.any():
            continue
        mine, others = ({k: v[part] for k, v in data.items()} for part in (own, ~own))
        threshold = threshold_for(rule(others, others), target)
        steps[own] = first_below(rule(mine, others), threshold)
    return steps


def compare(
    name: str, frames: str, data: Table, steps: np.ndarray, order: str = "order 0"
) -> Comparison:
    """A rule's leaps against the fixed step at their mean, which may lie between two."""
    made = np.take_along_axis(data[order], steps[:, None], axis=1)[:, 0]
    mean = float(steps.mean())
    low, share = int(mean), mean - int(mean)
    high = min(low + 1, data["t"].shape[1] - 1)
    fixed = (1 - share) * data["order 0"][:, low] + share * data["order 0"][:, high]
    gains = made - fixed
    powers = [
        float(np.mean((1 - share) * 10 ** (-a / 10) + share * 10 ** (-b / 10)))
        for a, b in ((made, made), (data["order 0"][:, low], data["order 0"][:, high]))
    ]
    return Comparison(
        rule=name,
        frames=frames,
        steps=mean + FIRST,
        gain=float(gains.mean()),
        interval=float(1.96 * gains.std(ddof=1) / math.sqrt(len(gains))),
        pooled_gain=10 * math.log10(powers[1] / powers[0]),
        better=float((gains > 0).mean()),
    )


def comparisons(lines: Sequence[Mapping[str, Any]]) -> Iterator[Comparison]:
    """Every rule at every target, for each length and for all together."""
    for lengths in (*((frames,) for frames in FRAMES), FRAMES):
        own = [line for line in lines if line["frames"] in lengths]
        data, seeds = table(own), np.array([line["seed"] for line in own])
        name = " + ".join(map(str, lengths))
        for target in TARGETS:
            fixed = np.full(len(own), target - FIRST)
            yield compare("order 1", name, data, fixed, "order 1")
            for rule, signal in RULES.items():
                yield compare(rule, name, data, chosen_steps(signal, data, seeds, target))


def curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per length: flow time, cosine of successive velocities and dB of leaps by step, means."""
    found = {}
    for frames in FRAMES:
        own = [line for line in lines if line["frames"] == frames]
        data = table(own)
        rounded = {
            name: np.round(data[name].mean(axis=0), 4).tolist()
            for name in ("t", "cosine", "order 0", "order 1")
        }
        spread = np.round(data["order 0"].std(axis=0), 3).tolist()
        decoded = np.array([line["psnr"] for line in own if "psnr" in line])
        gains = decoded[:, 1] - decoded[:, 0]
        found[str(frames)] = rounded | {
            "spread": spread,
            "psnr": np.round(decoded.mean(axis=0), 2).tolist(),
            "psnr_gain": round(float(gains.mean()), 3),
            "psnr_interval": round(float(1.96 * gains.std() / math.sqrt(len(gains))), 3),
            "psnr_better": float((gains > 0).mean()),
        }
    return found


def show(found: Sequence[Comparison]) -> str:
    headings = ["frames", "rule", "steps", "gain", "of the mean error", "better"]
    return markdown(
        headings,
        [
            [
                row.frames,
                row.rule,
                f"{row.steps:.1f}",
                f"{row.gain:+.2f} ± {row.interval:.2f} dB",
                f"{row.pooled_gain:+.2f} dB",
                f"{row.better:.0%}",
            ]
            for row in found
        ],
    )


def main() -> None:
    parser = scored_parser(__doc__ or "", PROMPTS, RESULTS / "leaps.json")
    parser.add_argument("--rows", type=Path, help="one line per video; those there stay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = options.rows or Path(folder, "leaps.jsonl")
        lines = gather(rows, options.prompts, options.model)
    found = list(comparisons(lines))
    print(show(found))
    setting = {"model": options.model, "prompts": options.prompts, "steps": STEPS, "first": FIRST}
    rules = [asdict(row) for row in found]
    write_json(options.json, {**setting, "curves": curves(lines), "rules": rules})


if __name__ == "__main__":
    main()
