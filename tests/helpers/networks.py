"""Small random networks saved as model folders, to be loaded whole or block by block."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_sora.loading.model_folder import Defaults, ModelFolder
from mlx_sora.models.hooks import BlockProvider, Hooks, TokenMerging
from mlx_sora.models.stdit3 import BlockPair, STDiT3, STDiT3Config
from mlx_sora.models.t5 import T5Config, T5Encoder

T5 = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=5, num_heads=4)
STDIT = STDiT3Config(
    input_sq_size=16, hidden_size=48, depth=5, num_heads=4, caption_channels=32, model_max_length=8
)
GRID = (4, 5, 6)


def leaves(network: nn.Module) -> dict[str, mx.array]:
    """Parameters of `network` under their paths."""
    flat: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
    return dict(flat)


def random_weights(network: nn.Module, seed: int) -> dict[str, mx.array]:
    """Parameters of `network` under their paths, drawn small."""
    flat = leaves(network)
    keys = mx.random.split(mx.random.key(seed), len(flat))
    return {
        path: 0.3 * mx.random.normal(value.shape, key=key)
        for (path, value), key in zip(flat.items(), keys, strict=True)
    }


def save(
    folder: Path, config: Mapping[str, object], weights: dict[str, mx.array], shards: int = 2
) -> None:
    """A part of a model folder: config.json, and shards whose border lies within a block."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(weights)
    size = -(-len(names) // shards)
    placed: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i}.safetensors"
        part = names[i * size : (i + 1) * size]
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in part})
        placed |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))


def t5_model(
    root: Path, config: T5Config = T5, dtype: mx.Dtype = mx.float32, seed: int = 1
) -> ModelFolder:
    weights = {k: v.astype(dtype) for k, v in random_weights(T5Encoder(config), seed).items()}
    save(root / "text_encoder", asdict(config), weights)
    return ModelFolder(root, "test", Defaults())


def stdit_model(
    root: Path, config: STDiT3Config = STDIT, dtype: mx.Dtype = mx.float32, seed: int = 2
) -> ModelFolder:
    weights = {k: v.astype(dtype) for k, v in random_weights(STDiT3(config), seed).items()}
    kernel = weights["x_embedder.proj.weight"]
    kernel = kernel.reshape(config.hidden_size, *config.patch_size, config.in_channels)
    weights["x_embedder.proj.weight"] = kernel.transpose(0, 4, 1, 2, 3)
    save(root / "transformer", asdict(config), weights)
    return ModelFolder(root, "test", Defaults())


def t5_states(network: T5Encoder, blocks: BlockProvider[object] | None = None) -> mx.array:
    """States of a padded batch of two."""
    embeds = mx.random.normal((2, 7, network.config.d_model), key=mx.random.key(3))
    mask = mx.array([[1] * 7, [1] * 4 + [0] * 3])
    out = network(embeds, mask, blocks)  # type: ignore[arg-type]
    mx.eval(out)
    return out


def steps(
    network: STDiT3,
    blocks: BlockProvider[BlockPair] | None = None,
    tokens: TokenMerging | None = None,
    *,
    count: int = 2,
    masked: bool = False,
) -> Iterator[mx.array]:
    """Predictions of `count` steps, each on the one before; text of two lengths."""
    config = network.config
    z = mx.random.normal((2, *GRID, config.in_channels), key=mx.random.key(4))
    text = mx.random.normal((8, config.caption_channels), key=mx.random.key(5))
    conditions = network.prepare([text[:5], text[:8]], GRID, height=40, width=48, fps=24)
    context: Hooks[BlockPair] = Hooks(blocks)
    if tokens is not None:
        context = Hooks(blocks, tokens)
    x_mask = mx.array([[False, True, True, True]] * 2) if masked else None
    for step in range(count):
        t = mx.array([900.0 - 300 * step] * 2)
        out = network(z, t, conditions, x_mask, context)
        mx.eval(out)
        yield out
        z = z + 0.1 * out[..., : config.in_channels]
