"""Writes and reads the bundled model in the layout of the published checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.shapes import world
from benchmarks.shapes.torch_stdit import STDiT3, STDiTConfig
from benchmarks.shapes.torch_t5 import T5Config, T5Encoder
from benchmarks.shapes.torch_vae import SpatialConfig, TemporalConfig, VideoVAE

# Kept in float32: constants that cost nothing and that every step depends on.
EXACT = ("rope.freqs", "scale", "shift", "y_embedder.y_embedding")
SHARDS = 2


def write_model(
    folder: Path,
    t5: tuple[T5Config, dict[str, Tensor]],
    transformer: tuple[STDiTConfig, dict[str, Tensor]],
    vae: VideoVAE,
    spiece: Path,
    guidance: float,
) -> None:
    """Write all parts under `folder`; weights become float16."""
    index = {
        "name": "shapes",
        "version": 2,
        "defaults": {
            "steps": 30,
            "guidance": guidance,
            "width": world.SIZE,
            "height": world.SIZE,
            "num_frames": world.CHUNK,
            "fps": world.FPS,
        },
        "license": "Apache-2.0",
        "card": world.model_card(),
    }
    _write_json(folder / "model_index.json", index)
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    if spiece.resolve() != (folder / "tokenizer" / "spiece.model").resolve():
        shutil.copyfile(spiece, folder / "tokenizer" / "spiece.model")
    _write_text_encoder(folder / "text_encoder", *t5)
    _write_part(folder / "transformer", _transformer_config(transformer[0]), transformer[1])
    _write_part(folder / "vae", _vae_config(vae), vae.state_dict())


def _transformer_config(c: STDiTConfig) -> dict[str, Any]:
    return {
        "model_type": "STDiT3",
        "input_size": [None, None, None],
        "patch_size": [1, 2, 2],
        "class_dropout_prob": 0.1,
        "pred_sigma": True,
        "drop_path": 0.0,
        "qk_norm": True,
        "enable_flash_attn": False,
        "enable_layernorm_kernel": False,
        "enable_sequence_parallelism": False,
        "only_train_temporal": False,
        "freeze_y_embedder": True,
        "skip_y_embedder": False,
    } | asdict(c)


def _vae_config(vae: VideoVAE) -> dict[str, Any]:
    spatial, temporal = SpatialConfig(), TemporalConfig()
    levels = len(spatial.block_out_channels)
    return {
        "model_type": "VideoAutoencoderPipeline",
        "vae_2d": {"type": "VideoAutoencoderKL", "micro_batch_size": 4},
        "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None},
        "micro_frame_size": world.CHUNK,
        "micro_batch_size": 4,
        "shift": [round(v, 6) for v in vae.shift.flatten().tolist()],
        "scale": [round(v, 6) for v in vae.scale.flatten().tolist()],
        "spatial_config": {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "act_fn": "silu",
            "sample_size": world.SIZE,
        }
        | asdict(spatial),
        "temporal_config": asdict(temporal),
    }


def _write_text_encoder(folder: Path, c: T5Config, weights: dict[str, Tensor]) -> None:
    """Two shards and an index, as large T5 checkpoints come."""
    config = asdict(c) | {
        "model_type": "t5",
        "architectures": ["T5EncoderModel"],
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.1,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    _write_json(folder / "config.json", config)
    half = _to_half(weights)
    groups = [{k: v for k, v in half.items() if k.startswith("shared")}]
    groups.append({k: v for k, v in half.items() if k not in groups[0]})
    places = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        _save(group, folder / name)
        places |= dict.fromkeys(group, name)
    size = sum(v.numel() * v.element_size() for v in half.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_part(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    _write_json(folder / "config.json", config)
    _save(_to_half(weights), folder / "model.safetensors")


def _to_half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        k: v.detach().to(torch.float32 if k in EXACT else torch.float16).contiguous()
        for k, v in weights.items()
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def read_text_encoder(folder: Path) -> T5Encoder:
    """The shipped text encoder, computing in float32."""
    weights: dict[str, Tensor] = {}
    for shard in sorted((folder / "text_encoder").glob("*.safetensors")):
        weights |= load_file(shard)
    model = T5Encoder(_known(T5Config, folder / "text_encoder"))
    return _fill(model, weights)


def read_transformer(folder: Path) -> STDiT3:
    """The shipped transformer, computing in float32."""
    model = STDiT3(_known(STDiTConfig, folder / "transformer"))
    return _fill(model, load_file(folder / "transformer" / "model.safetensors"))


def read_vae(folder: Path) -> VideoVAE:
    """The shipped VAE, computing in float32."""
    config = json.loads((folder / "vae" / "config.json").read_text())
    model = VideoVAE(
        _pick(SpatialConfig, config["spatial_config"]),
        _pick(TemporalConfig, config["temporal_config"]),
    )
    return _fill(model, load_file(folder / "vae" / "model.safetensors"))


def read_guidance(folder: Path) -> float:
    """The default guidance of a model folder."""
    return float(json.loads((folder / "model_index.json").read_text())["defaults"]["guidance"])


def _known(kind: Any, folder: Path) -> Any:
    return _pick(kind, json.loads((folder / "config.json").read_text()))


def _pick(kind: Any, values: dict[str, Any]) -> Any:
    """A config dataclass from the keys it knows."""
    names = kind.__dataclass_fields__
    pairs = ((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items() if k in names)
    return kind(**dict(pairs))


def _fill(model: Any, weights: dict[str, Tensor]) -> Any:
    model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=True)
    assert isinstance(model, nn.Module)
    return model.eval()


def _save(weights: dict[str, Tensor], path: Path) -> None:
    """safetensors writes through a private temporary file; the result is for everyone to read."""
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)
