"""Writes a model folder of the published shapes with random weights: T5-XXL, STDiT3-XL/2, VAE v1.2.

    python -m benchmarks.full_model FOLDER [--dtype bfloat16]

12 GB in bfloat16, 24 in float32. Time, memory and reading are those of the published model; what it
makes is noise. Rotary frequencies, norms and the latent statistics are plain, so that nothing
overflows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import mlx_sora  # noqa: F401  (before mlx.core: it puts the fast BLAS in place)

import mlx.core as mx  # isort: skip

from mlx_sora.loading.model_folder import Defaults, ModelFolder
from mlx_sora.loading.quantization import BLOCK_PATH
from mlx_sora.memory.limits import memory_scope, release
from tests.helpers.full_size import CONFIGS, MANIFESTS

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / "tests" / "parity" / "golden"
TOKENIZER = ROOT / "weights" / "shapes" / "tokenizer"

#: Statistics of the latents that leave random ones as they are.
PLAIN = {"shift": [0.0] * 4, "scale": [1.0] * 4}

#: Key of config.json with the number of blocks.
_DEPTHS = {"transformer": "depth", "text_encoder": "num_layers"}

#: Tensors up to this many bytes go together into one file, as the hub's own shards do.
SHARD = 4 << 30


def random_tensor(key: str, shape: tuple[int, ...], dtype: mx.Dtype, noise: mx.array) -> mx.array:
    """Weights that keep activations near one: deviation 1/√inputs; norms 1, biases 0."""
    if key in ("scale", "shift"):
        return mx.full(shape, 1.0 if key == "scale" else 0.0, dtype)
    if key == "rope.freqs":
        return (10000.0 ** -(mx.arange(shape[0]) / shape[0])).astype(dtype)
    if len(shape) == 1:
        return mx.full(shape, 0.0 if key.endswith("bias") else 1.0, dtype)
    count, inputs = prod(shape), prod(shape[1:])
    repeats = -(-count // noise.size)
    drawn = mx.concatenate([noise] * repeats)[:count] if repeats > 1 else noise[:count]
    return (drawn.reshape(shape) * inputs**-0.5).astype(dtype)


def write_part(folder: Path, part: str, dtype: mx.Dtype, depth: int | None = None) -> None:
    """One network: config.json, shards and their index. depth: blocks, if not all."""
    folder.mkdir(parents=True)
    config = CONFIGS[part] | ({} if depth is None else {_DEPTHS[part]: depth})
    if part == "vae":
        config |= PLAIN
    (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((SHAPES / f"manifest_{MANIFESTS[part]}.json").read_text())
    if depth is not None:
        manifest = {key: row for key, row in manifest.items() if _number(key) < depth}
    noise = mx.random.normal((1 << 24,), key=mx.random.key(0))
    shards: list[dict[str, mx.array]] = [{}]
    weight_map, held = {}, 0
    for key, (shape, _) in manifest.items():
        tensor = random_tensor(key, tuple(shape), dtype, noise)
        if held + tensor.nbytes > SHARD and held:
            _save(folder, shards[-1], len(shards))
            shards, held = [*shards[:-1], {}, {}], 0
        shards[-1][key] = tensor
        weight_map[key] = _name(len(shards))
        held += tensor.nbytes
    _save(folder, shards[-1], len(shards))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _number(key: str) -> int:
    """Of the block that a tensor belongs to; -1 for the rest."""
    match = BLOCK_PATH.match(key)
    return -1 if match is None else int(match[1])


def _name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def _save(folder: Path, shard: dict[str, mx.array], number: int) -> None:
    mx.save_safetensors(str(folder / _name(number)), shard)
    mx.clear_cache()


def write_model(
    folder: Path, dtype: mx.Dtype = mx.bfloat16, depths: Mapping[str, int] | None = None
) -> None:
    """All parts, and the tokenizer of the bundled model, which is the real one.

    depths: blocks of T5 and of the transformer, if not all.
    """
    for part in CONFIGS:
        write_part(folder / part, part, dtype, (depths or {}).get(part))
    shutil.copytree(TOKENIZER, folder / "tokenizer")


@contextmanager
def random_transformer(depth: int) -> Iterator[ModelFolder]:
    """A folder that holds a transformer of `depth` float32 block pairs and nothing else."""
    with tempfile.TemporaryDirectory() as folder, memory_scope():
        write_part(Path(folder, "transformer"), "transformer", mx.float32, depth)
        release()
        yield ModelFolder(Path(folder), "random", Defaults())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = parser.parse_args()
    write_model(options.folder, getattr(mx, options.dtype))


if __name__ == "__main__":
    main()
