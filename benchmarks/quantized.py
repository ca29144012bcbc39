"""What fewer bits cost: bytes on disk, memory, error per layer, quality of videos, CPU seconds.

    python -m benchmarks.quantized [--prompts 24] [--frames 17] [--json FILE]
    python -m benchmarks.quantized --full-size FOLDER

The first makes the same held-out prompts, one seed each, with every row of ROWS on the bundled
model. Finished rows stay: the command continues where it was, unless prompts, frames, steps or
weights are others. PSNR (over all frames together) and SSIM compare with the plain video of the
same seed; adherence is the share of videos that show all that was asked. mixed:BITS first measures
the sensitivities on prompts for training. A layer's error is that of its output for random input, a
network's that of its output for real input, relative to the output. Rows with gptq are converted
with compensation, measured on other prompts for training; distilled ones then learn on these. Needs
`pip install -e ".[bench]"`. The second writes a model of the published shapes with random weights
into FOLDER (12 GB in bfloat16, 7 GB converted; removed unless --keep) and converts that. Exits with
1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip
import numpy as np

from benchmarks.common import RESULTS, markdown, write_json
from benchmarks.full_model import write_model
from benchmarks.ondevice import make, psnr
from benchmarks.quantized_weights import codebooks, distance, full_width, layer_errors
from benchmarks.shapes import world
from benchmarks.shapes.scorer import read_video, score
from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.loading.model_folder import PARTS, Defaults, ModelFolder, find_model
from mlx_sora.loading.networks import load_text_encoder, load_transformer, quantizable_layers
from mlx_sora.loading.published import PublishedModel
from mlx_sora.loading.quantization import EMBEDDING, NetworkQuantization, named_form
from mlx_sora.loading.quantization_choice import (
    SENSITIVITIES,
    Sensitivities,
    choose_quantization,
    weights_hash,
)
from mlx_sora.loading.safetensors import FLOATS
from mlx_sora.manage.conversion_plan import ConversionOptions, Gptq, TensorConversion, plan_part
from mlx_sora.manage.convert import convert
from mlx_sora.memory.limits import StageMeter, memory_scope, release
from mlx_sora.models.quantized import Quantization
from mlx_sora.pipeline.calibrate import requests_for
from mlx_sora.pipeline.sensitivity import measure_sensitivities
from mlx_sora.request.options import NETWORKS

PLAIN = "plain"

#: Row → value of --quantize, or the form of all layers.
ROWS: dict[str, int | str | Quantization] = {
    "8 bits": 8,
    "6 bits": 6,
    "5 bits": 5,
    "4 bits": 4,
    "3 bits": 3,
    "6 bits, not rotated": Quantization(6),
    "4 bits, not rotated": Quantization(4),
    "3 bits, not rotated": Quantization(3),
    "mixed:5": "mixed:5",
    "mixed:4": "mixed:4",
    "mixed:3.5": "mixed:3.5",
    "t5=4": "t5=4",
    "t5=4,transformer=8": "t5=4,transformer=8",
    **{f"{value} bits, gptq": value for value in (6, 5, 4, 3)},
    **{f"{value}, gptq": value for value in ("mixed:4", "mixed:3.5")},
    "4 bits, gptq, distilled": 4,
    "mixed:4, gptq, distilled": "mixed:4",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
}

#: Prompts and steps that the sensitivities are measured with.
CALIBRATION, CALIBRATION_STEPS = 6, 10

#: Mark of the rows with compensation, its prompts, and ending and steps of those that then learn.
GPTQ, TEXTS = ", gptq", 48
DISTILLED, LEARNING_STEPS = f"{GPTQ}, distilled", 600

#: Bytes that the published T5 and STDiT may have, by bits, and what the rows have to reach.
MOST = {
    8: {"text_encoder": 5.2e9, "transformer": 1.4e9},
    4: {"text_encoder": 2.7e9, "transformer": 0.75e9},
}
BARS = {
    "8 bits": 55.0,
    f"6 bits{GPTQ}": 50.0,
    f"mixed:4{DISTILLED}": 42.0,
    f"mixed:3.5{GPTQ}": 34.0,
}
LOSS = {"8 bits": 0.01, f"mixed:4{DISTILLED}": 0.02}


@dataclass(frozen=True)
class Study:
    """The plain model, its sensitivities in a folder of links, and the plain videos."""

    model: ModelFolder
    requests: tuple[GenerationRequest, ...]
    plain: tuple[np.ndarray, ...]

    def row(self, name: str) -> dict[str, Any]:
        """Make the videos of a row, and compare."""
        value = ROWS.get(name)
        model = asked = self.model
        if isinstance(value, Quantization):
            one = NetworkQuantization(value)
            asked = replace(model, quantization=tuple((part, one) for part in NETWORKS.values()))
        elif value is not None:
            asked = choose_quantization(model, value)
        with tempfile.TemporaryDirectory() as folder:
            steps = LEARNING_STEPS if name.endswith(DISTILLED) else 0
            model = self.compensated(value, Path(folder), steps) if GPTQ in name else asked
            return self.compare(name, model, dict(asked.quantization))

    def compensated(self, value: Any, folder: Path, distill: int) -> ModelFolder:
        """Convert the model in `folder`, scales in float32 as in rows that quantize on loading."""
        prompts = [world.caption(truth) for truth in world.split()[0][5::11][:TEXTS]]
        options = ConversionOptions(value, "float32", Gptq(tuple(prompts), distill=distill))
        return ModelFolder.open(convert(self.model, folder / "gptq", options).path)

    def compare(
        self, name: str, model: ModelFolder, forms: Mapping[str, NetworkQuantization]
    ) -> dict[str, Any]:
        """Make the videos with `model`, of these forms, and compare."""
        from skimage.metrics import structural_similarity

        videos = [make(Pipeline(model), request) for request in self.requests]
        pairs = list(zip([video.frames for video in videos], self.plain, strict=True))
        similar = partial(structural_similarity, channel_axis=-1, data_range=255)
        errors = [float(np.mean((a.astype(float) - b.astype(float)) ** 2)) for a, b in pairs]
        truths = world.split()[1][: len(self.requests)]
        return {
            "row": name,
            "memory": max(video.memory for video in videos),
            "psnr": psnr(statistics.mean(errors)),
            "psnr_of_prompts": [psnr(error) for error in errors],
            "ssim": float(np.mean([similar(a, b) for x, y in pairs for a, b in zip(x, y)])),  # noqa: B905
            "adherence": score([read_video(video.frames) for video in videos], truths),
        } | ({} if not forms else self.facts(model, forms))

    def facts(self, model: ModelFolder, forms: Mapping[str, NetworkQuantization]) -> dict[str, Any]:
        """Bits of the bundled model, bytes of the published one, and errors of the networks."""
        return {
            "bits": average(self.model, forms),
            "published_bytes": published_bytes(self.model, forms),
            "errors": network_errors(self.model, model),
        }


def average(model: ModelFolder, forms: Mapping[str, NetworkQuantization]) -> float:
    """Bits per weight, scales left out, over all that can be quantized; 16 where they are not."""
    bits = total = 0
    for part in NETWORKS.values():
        tensors = model.checkpoint(part).tensors
        own = quantizable_layers(model, part, forms[part]) if part in forms else {}
        for path in quantizable_layers(model, part, NetworkQuantization(named_form(4))):
            count = prod(tensors[f"{path}.weight"].shape)
            bits += count * (own[path].bits if path in own else 16)
            total += count
    return bits / total


def published_bytes(model: ModelFolder, forms: Mapping[str, NetworkQuantization]) -> dict[str, int]:
    """Bytes of the converted Open-Sora 1.2, by part; averages have the same bits in each part."""
    published = PublishedModel(Path("opensora-1.2"), "opensora-1.2", Defaults())
    found = {}
    for part in NETWORKS.values():
        if part in forms and forms[part].default is None:
            bits = average(model, forms)
            table = tuple(pair for pair in forms[part].layers if pair[0] == EMBEDDING)
            low, high = (
                _bytes(published, part, NetworkQuantization(Quantization(n), table)) for n in (4, 8)
            )
            found[part] = int(low + (high - low) * (bits - 4) / 4)
        else:
            found[part] = _bytes(published, part, forms.get(part))
    return found


def _bytes(model: ModelFolder, part: str, quantization: NetworkQuantization | None) -> int:
    layers = {} if quantization is None else quantizable_layers(model, part, quantization)
    total = 0
    for key, info in model.checkpoint(part).tensors.items():
        form = layers.get(key.removesuffix(".weight"))
        wide = len(info.shape) == 1
        dtype = FLOATS[info.dtype] if wide else mx.bfloat16
        total += TensorConversion(key, info, dtype, form).nbytes
    return total


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


def measured_model(plain: ModelFolder, root: Path, known: dict[str, Any] | None) -> ModelFolder:
    """Links to the bundled model, with its sensitivities: `known`, or of prompts for training."""
    for file in plain.path.iterdir():
        (root / file.name).symlink_to(file)
    model = replace(plain, path=root)
    if known is None:
        prompts = [world.caption(truth) for truth in world.split()[0][::40][:CALIBRATION]]
        requests = requests_for(prompts, {"steps": CALIBRATION_STEPS})
        known = asdict(measure_sensitivities(Pipeline(model).engine, requests))
    Sensitivities(**known).write(root / SENSITIVITIES)
    return model


def shapes(options: argparse.Namespace, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the study on the bundled model after each row; `known` is what an earlier run left."""
    plain = find_model("shapes")
    setting = {name: getattr(options, name) for name in ("prompts", "frames", "steps")}
    setting["weights"] = weights_hash(plain)
    rows = {row["row"]: row for row in known.get("rows", ())}
    if {name: known.get(name) for name in setting} != setting:
        rows = {}
    measured = known.get("sensitivities") if known.get("weights") == setting["weights"] else None
    requests = tuple(
        GenerationRequest.from_dict(
            {
                "prompt": world.caption(truth),
                "seed": seed,
                "steps": options.steps,
                "num_frames": options.frames,
                "sampler": "rflow",
                "text_cache": False,
            }
        )
        for seed, truth in enumerate(world.split()[1][: options.prompts])
    )
    missing = [name for name in (PLAIN, *ROWS) if name not in rows]
    with tempfile.TemporaryDirectory() as root:
        if missing:
            model = measured_model(plain, Path(root), measured)
            measured = json.loads((model.path / SENSITIVITIES).read_text())
            videos = tuple(make(Pipeline(model), request).frames for request in requests)
            study = Study(model, requests, videos)
        for name in missing:
            rows[name] = study.row(name)
            print(name, f"{rows[name]['psnr'] or 0:.1f} dB", flush=True)
            ordered = [rows[each] for each in (PLAIN, *ROWS) if each in rows]
            yield {**setting, "sensitivities": measured, "rows": ordered}
    if not missing:
        ordered = [rows[each] for each in (PLAIN, *ROWS)]
        yield {**setting, "sensitivities": measured, "rows": ordered}


def met(result: Mapping[str, Any]) -> bool:
    """Print each bar, and return True if all are met."""
    rows = {row["row"]: row for row in result["rows"]}
    if len(rows) <= len(ROWS):
        return False  # not all are measured
    truth = rows[PLAIN]["adherence"]["all"]
    bars = [rows[name]["psnr"] >= least for name, least in BARS.items()]
    bars += [truth - rows[name]["adherence"]["all"] <= most for name, most in LOSS.items()]
    for bits, most in MOST.items():
        found = rows[f"{bits} bits"]["published_bytes"]
        bars += [found[part] <= limit for part, limit in most.items()]
    return all(bars)


def show(rows: list[dict[str, Any]]) -> str:
    headings = ["", "bits", "T5 GB", "STDiT GB", "PSNR", "SSIM", "all right", "velocity error"]
    return markdown(
        headings,
        [
            [
                row["row"],
                f"{row['bits']:.2f}" if "bits" in row else "–",
                *(
                    f"{row['published_bytes'][part] / 1e9:.2f}" if "bits" in row else "–"
                    for part in NETWORKS.values()
                ),
                "–" if row["psnr"] is None else f"{row['psnr']:.1f}",
                f"{row['ssim']:.4f}",
                f"{row['adherence']['all']:.0%}",
                f"{row['errors']['velocity']:.4f}" if "errors" in row else "–",
            ]
            for row in rows
        ],
    )


def stored(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


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
                for part in NETWORKS.values()
            },
            "largest_block": block,
            "peak_memory": meter.usage.peak_memory - before,
            "peak_process": meter.usage.peak_rss,
            "seconds": meter.usage.seconds,
        }
    finally:
        for made in () if keep else (source, target):
            shutil.rmtree(made, ignore_errors=True)
    met = all(result["stored"][part] <= most for part, most in MOST[8].items())
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
    known = json.loads(options.json.read_text()) if options.json.is_file() else {}
    known.pop("machine", None)
    if options.full_size:
        result, sound = full_size(options.full_size, options.keep)
        write_json(options.json, {**known, "full_size": result})
        print(json.dumps(result, indent=2))
    else:
        for name, make_table in (("full_width", full_width), ("codebooks", codebooks)):
            if name not in known:
                with memory_scope(1 << 30):  # as in a run; else new pages cost as much as products
                    known[name] = make_table()
        for result in shapes(options, known.get("shapes", {})):
            write_json(options.json, {**known, "shapes": result})
        print(show(result["rows"]))
        sound = met(result)
    print("bars met" if sound else "a bar is missed")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
