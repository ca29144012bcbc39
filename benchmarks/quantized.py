"""What 8 and 4 bits cost: bytes on disk, memory, seconds, error per layer, quality of videos.

    python -m benchmarks.quantized [--prompts 24] [--frames 17] [--json FILE]
    python -m benchmarks.quantized --full-size FOLDER

The first converts the bundled model and makes the same held-out prompts with every row, one seed
each, in turn. PSNR compares with the plain video of the same seed; adherence is the share of videos
that show all that was asked. A layer's error is that of its output for random input, relative to
the output; a network's that of its output for real input. Needs `pip install -e ".[bench]"`.
The second writes a model of the published shapes with random weights into FOLDER (12 GB in
bfloat16, 7 GB converted; removed unless --keep) and converts that. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip
import numpy as np
from mlx import nn

from benchmarks.common import RESULTS, markdown, write_json
from benchmarks.full_model import write_model
from benchmarks.ondevice import make, psnr
from benchmarks.shapes import world
from benchmarks.shapes.scorer import Reading, read_video, score
from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.loading.model_folder import PARTS, ModelFolder, find_model
from mlx_sora.loading.networks import load_text_encoder, load_transformer
from mlx_sora.manage.conversion_plan import ConversionOptions, plan_part
from mlx_sora.manage.convert import convert
from mlx_sora.memory.limits import StageMeter, release
from mlx_sora.models.quantized import QuantizedLinear

PLAIN = "plain"
BITS = (8, 4)

#: Adherence that 8 bits may lose, and bytes that the published T5 and STDiT may have with them.
LOSS, MOST = 0.01, {"text_encoder": 5.2e9, "transformer": 1.4e9}


@dataclass
class Tally:
    """What is gathered of one row, a value per prompt."""

    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A row of the table. stored: bytes of the files, by part. memory: MLX's peak while denoising.

    seconds: of the steps, median; speed: median ratio to plain. psnr: dB over all frames together.
    """

    row: str
    stored: Mapping[str, int]
    memory: int
    seconds: float
    speed: float
    psnr: float | None
    adherence: Mapping[str, float]


def gather(models: Mapping[str, ModelFolder], options: argparse.Namespace) -> dict[str, Tally]:
    """Every row on every prompt; the order of the rows turns, so that none is always first."""
    pipes = {name: Pipeline(model) for name, model in models.items()}
    tallies = {name: Tally() for name in models}
    names = list(models)
    for seed, truth in enumerate(world.split()[1][: options.prompts]):
        request = GenerationRequest.from_dict(
            {
                "prompt": world.caption(truth),
                "seed": seed,
                "steps": options.steps,
                "num_frames": options.frames,
                "sampler": "rflow",
            }
        )
        if seed == 0:
            make(pipes[PLAIN], request)
        turned = names[seed % len(names) :] + names[: seed % len(names)]
        made = {name: make(pipes[name], request) for name in turned}
        plain = made[PLAIN].frames.astype(np.float64)
        for name, tally in tallies.items():
            tally.seconds.append(made[name].seconds)
            tally.memory.append(made[name].memory)
            tally.errors.append(float(np.mean((made[name].frames - plain) ** 2)))
            tally.readings.append(read_video(made[name].frames))
        print(f"{seed + 1} of {options.prompts} prompts", flush=True)
    return tallies


def table(
    models: Mapping[str, ModelFolder], tallies: Mapping[str, Tally], prompts: int
) -> Iterator[Row]:
    truths = world.split()[1][:prompts]
    for name, tally in tallies.items():
        ratios = [a / b for a, b in zip(tallies[PLAIN].seconds, tally.seconds, strict=True)]
        yield Row(
            row=name,
            stored={part: stored(models[name].path / part) for part in PARTS},
            memory=max(tally.memory),
            seconds=statistics.median(tally.seconds),
            speed=statistics.median(ratios),
            psnr=psnr(statistics.mean(tally.errors)),
            adherence=score(tally.readings, truths),
        )


def stored(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def layer_errors(plain: nn.Module, quantized: nn.Module) -> dict[str, dict[str, float]]:
    """Error of each kind of layer: mean and largest over the blocks."""
    layers = dict(plain.named_modules())
    found: dict[str, list[float]] = {}
    for path, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLinear):
            x = mx.random.normal((256, layers[path].weight.shape[1]), key=mx.random.key(0))
            kind = re.sub(r"\.\d+\.", ".", path)
            found.setdefault(kind, []).append(distance(layer(x), layers[path](x)))
    return {
        kind: {"mean": statistics.mean(errors), "max": max(errors)}
        for kind, errors in found.items()
    }


def distance(found: mx.array, expected: mx.array) -> float:
    """Norm of the difference over that of what is expected."""
    return float((mx.linalg.norm(found - expected) / mx.linalg.norm(expected)).item())


def network_errors(plain: ModelFolder, quantized: ModelFolder) -> dict[str, Any]:
    """Of T5's states of one prompt, and of one velocity from noise under them."""
    from mlx_sora.text.encoder import encode_tokens
    from mlx_sora.text.tokenizer import Tokenizer

    prompt = world.caption(world.split()[1][0])
    tokenizer = Tokenizer.load(plain.tokenizer)
    networks: dict[str, Any] = {}
    states, velocities = [], []
    for model in (plain, quantized):
        t5, rows = load_text_encoder(model, mx.float32)
        states.append(encode_tokens(t5, rows, tokenizer.encode(prompt).ids, mx.float32))
        stdit = load_transformer(model, mx.float32)
        z = mx.random.normal((1, 5, 8, 8, 4), key=mx.random.key(1))
        given = stdit.prepare([states[0]], (5, 8, 8), height=64, width=64, fps=24)
        velocities.append(stdit(z, mx.array([600.0]), given)[..., :4])
        for name, network in (("text_encoder", t5), ("transformer", stdit)):
            networks.setdefault(name, []).append(network)
    return {
        "text_states": distance(states[1], states[0]),
        "velocity": distance(velocities[1], velocities[0]),
        "layers": {name: layer_errors(*pair) for name, pair in networks.items()},
    }


def shapes(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The study on the bundled model, and whether its bar is met."""
    plain = find_model("shapes")
    with tempfile.TemporaryDirectory() as root:
        models = {PLAIN: plain}
        for bits in BITS:
            made = convert(plain, Path(root) / f"{bits}", ConversionOptions(bits))
            models[f"{bits} bits"] = ModelFolder.open(made.path)
        errors = {
            name: network_errors(plain, model) for name, model in models.items() if name != PLAIN
        }
        rows = list(table(models, gather(models, options), options.prompts))
    print(show(rows, errors))
    lost = rows[0].adherence["all"] - rows[1].adherence["all"]
    setting = {name: getattr(options, name) for name in ("prompts", "frames", "steps")}
    return {**setting, "rows": [asdict(row) for row in rows], "errors": errors}, lost <= LOSS


def show(rows: list[Row], errors: Mapping[str, Any]) -> str:
    headings = ["", "T5 + STDiT MB", "peak MB", "s", "speed", "PSNR", "all right", "velocity error"]
    return markdown(
        headings,
        [
            [
                row.row,
                f"{(row.stored['text_encoder'] + row.stored['transformer']) / 1e6:.1f}",
                f"{row.memory / 1e6:.0f}",
                f"{row.seconds:.2f}",
                f"{row.speed:.2f}×",
                "–" if row.psnr is None else f"{row.psnr:.1f}",
                f"{row.adherence['all']:.0%}",
                f"{errors[row.row]['velocity']:.4f}" if row.row in errors else "–",
            ]
            for row in rows
        ],
    )


def full_size(folder: Path, keep: bool) -> tuple[dict[str, Any], bool]:
    """Convert a model of the published shapes to 8 bits: bytes, memory and seconds."""
    source, target = folder / "random", folder / "8bit"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_model(source, mx.bfloat16)
        model = ModelFolder.open(source)
        block = _largest_block(model)
        release()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        with StageMeter("convert") as meter:
            convert(model, target, ConversionOptions(8))
        assert meter.usage is not None
        result = {
            "source_bytes": sum(stored(source / part) for part in PARTS),
            "stored": {part: stored(target / part) for part in PARTS},
            "stored_4_bits": {
                part: sum(shard.nbytes for shard in plan_part(model, part, ConversionOptions(4)))
                for part in MOST
            },
            "largest_block": block,
            "peak_memory": meter.usage.peak_memory - before,
            "peak_process": meter.usage.peak_rss,
            "seconds": meter.usage.seconds,
        }
    finally:
        for made in () if keep else (source, target):
            shutil.rmtree(made, ignore_errors=True)
    met = all(result["stored"][part] <= most for part, most in MOST.items())
    return result, met and result["peak_memory"] <= 2 * block


def _largest_block(model: ModelFolder) -> int:
    """Bytes of T5's largest block as it is stored."""
    return max(
        shard.source_bytes for shard in plan_part(model, "text_encoder", ConversionOptions())[:-1]
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24, help="how many; default 24, at most 96")
    parser.add_argument("--frames", type=int, default=world.CHUNK)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--full-size", type=Path, metavar="FOLDER", help="a model as published")
    parser.add_argument("--keep", action="store_true", help="leave the full-size models there")
    parser.add_argument("--json", type=Path, default=RESULTS / "quantized.json")
    return parser.parse_args()


def main() -> int:
    """One of the studies; the other's figures in the file stay."""
    options = arguments()
    if options.full_size:
        name, (result, met) = "full_size", full_size(options.full_size, options.keep)
        print(json.dumps(result, indent=2))
    else:
        name, (result, met) = "shapes", shapes(options)
    known = json.loads(options.json.read_text()) if options.json.is_file() else {}
    known.pop("machine", None)
    write_json(options.json, {**known, name: result})
    print("bars met" if met else "a bar is missed")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
